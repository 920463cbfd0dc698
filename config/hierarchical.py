"""Group-hierarchical latents (sec. 3.3) on the embedded data, without class labels: 3 groups of 4 latents, heard at 7,
14 and 28 pixels of the up-sampling branch.

    python train_stage1.py config/hierarchical.py
    python train_prior.py --out_dir=out/hierarchical
    python train_prior.py --out_dir=out/hierarchical --prior=sedd
    python sample.py --out_dir=out/hierarchical

compare_groups.py runs this, and shows what each group decides.
"""
out_dir = "out/hierarchical"
class_cond = False
attn_resolutions = (28, 14, 7)
num_latents = 12
groups = 3
coarse_images = 100_000
total_images = 100_000
batch_size = 32
ema_rampup = 0.05
log_every = 5_000
save_every = 10_000
preview_every = 50_000
