"""All 60,000 images of Fashion-MNIST on one GPU, without class labels: codes added to a trained plain EDM, as in
config/finetune.py, with a network twelve times as large.

    python data.py fashion-mnist
    python compare_models.py --stage1_config=config/fashion_mnist.py --prior_config=config/fashion_mnist_prior.py \
        --base_images=358_400 --total_images=358_400 --num_images=10_000 --batch_size=1_000 --out_dir=out/compare-gpu
"""
out_dir = "out/fashion_mnist"
dataset = "fashion-mnist"
held_out = 1_000
class_cond = False
model_channels = 64
channel_mult = (1, 2, 2)
num_blocks = 2
attn_resolutions = (14, 7)
coarse_images = 400_000
total_images = 358_400
batch_size = 256
lr = 1e-3
warmup_images = 20_000
ema_rampup = 0.05
log_every = 25_600
save_every = 256_000
preview_every = 358_400
