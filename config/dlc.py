"""Discrete Latent Codes on the embedded data, without class labels: 64 codes of 8 values, averaged into the
embedding of the default network. Two minutes for the encoder, then 100,000 images for the denoiser.

    python train_encoder.py
    python train_stage1.py config/dlc.py
    python train_prior.py config/dlc_prior.py
    python train_prior.py config/dlc_sedd_prior.py
    python sample.py --out_dir=out/dlc
    python sample.py --out_dir=out/dlc --prior=sedd --sedd_sampler=analytic --sedd_steps=64 --eta=0.02
    python train_stage1.py config/dlc.py --num_latents=0 --out_dir=out/dlc-plain    # without codes
"""
out_dir = "out/dlc"
class_cond = False
codes = "out/dlc"
total_images = 100_000
batch_size = 32
ema_rampup = 0.05
log_every = 5_000
save_every = 10_000
preview_every = 50_000
