"""The paper's recipe on the embedded data: codes added to a trained plain EDM, without class labels.

    python train_stage1.py config/finetune.py --num_latents=0 --total_images=100_000 --out_dir=out/edm
    python train_stage1.py config/finetune.py --init_from=out/edm --out_dir=out/finetuned
    python train_prior.py --out_dir=out/finetuned
    python sample.py --out_dir=out/finetuned

compare_models.py runs this, and the plain network trained on, on three seeds.
"""
out_dir = "out/finetuned"
class_cond = False
coarse_images = 100_000
total_images = 50_000
batch_size = 32
ema_rampup = 0.05
log_every = 5_000
save_every = 10_000
preview_every = 50_000
