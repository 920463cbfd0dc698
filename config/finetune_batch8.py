"""As config/finetune.py, in batches of 8: four times the updates, which help plain EDM more than codes (one seed)."""
out_dir = "out/finetuned-8"
class_cond = False
coarse_images = 100_000
total_images = 50_000
batch_size = 8
ema_rampup = 0.1
log_every = 5_000
save_every = 10_000
preview_every = 50_000
