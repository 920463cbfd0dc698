"""LLaDA-8B-Base, fine-tuned to write the codes of config/imagenet256_dlc.py from captions, on eight GPUs of 80 GB.

    torchrun --nproc_per_node=8 train_text.py config/llada.py --captions=captions.txt
    python sample.py --out_dir=out/imagenet256_dlc --prompt="a teapot on a mountain" --text_order=random \\
        --temperature=0.2 --guidance=3

LLaDA-8B-Base is a folder with its published files: model-*.safetensors with their index, and tokenizer.json. DLC trains
on 9 million images of LAION and their captions (sec. 6, App. E); here they are those of stage 1's data set. The rate
is DLC's; its cosine, warm-up and batch too.
"""
out_dir = "out/imagenet256_dlc"
init_from = "LLaDA-8B-Base"
fsdp = True
# text
tokenizer = "LLaDA-8B-Base/tokenizer.json"
vocabulary = 126_464
mask_token = 126_336
context = 127
# the Transformer
layers = 32
dim = 4096
heads = 32
hidden = 12_288
theta = 500_000.0
place_embedding = False
recompute = True
# masks: all at one rate
kept = 0.0
dropped = 0.0
# optimisation
total_images = 9_000_000
batch_size = 128
batch_gpu = 4
lr = 1e-5
warmup_images = 640
ema_decay = 0.0
log_every = 64_000
save_every = 640_000
