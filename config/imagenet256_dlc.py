"""Discrete Latent Codes on ImageNet-256, without class labels: DiT-XL/2 on Stable Diffusion's latents and on averaged
codes of 512 x 256. Sizes and optimisation are DiT's, which DLC keeps (sec. 5, App. E).

    python data.py imagenet256 --source=ILSVRC/Data/CLS-LOC/train --resolution=256 \
        --transform=center-crop-dhariwal --vae=sd-vae-ft-ema.safetensors --xflip=True
    torchrun --nproc_per_node=4 train_encoder.py config/imagenet_encoder.py
    torchrun --nproc_per_node=8 train_stage1.py config/imagenet256_dlc.py
    torchrun --nproc_per_node=8 train_prior.py config/imagenet256_dlc_prior.py
    torchrun --nproc_per_node=8 sample.py config/sample_dlc.py           # the row with FID 2.00
    torchrun --nproc_per_node=8 sample.py config/sample_dlc_guided.py    # the row with FID 1.59

DLC trains by DDPM's loss with learned variances; here the DiT is EDM's denoiser. Noise levels are therefore
EDM2's, for whose latents sigma_data is 0.5, times two. The paper trains "for up to 800 epochs", and does not say how
long for which number. DiT's moving average has no ramp.
"""
out_dir = "out/imagenet256_dlc"
dataset = "imagenet256"
held_out = 5_000
class_cond = False
xflip = True
space = "vae"
# denoiser: DiT-XL/2, 673.7 M parameters, and 151.6 M in the table of codes
denoiser = "dit"
patch = 2
width = 1152
depth = 28
heads = 16
# discrete latents
codes = "out/imagenet_dlc512"
conditioning = "average"
null_prob = 0.1
# optimisation
total_images = 1_024_000_000  # 800 epochs
batch_size = 256
batch_gpu = 32
lr = 1e-4  # constant
code_lr = 1e-4  # the published rate for all
warmup_images = 0
ema_halflife_images = 1_774_000  # 0.9999 per step
ema_rampup = 1.0
P_mean = 0.293  # -0.4 + ln 2
P_std = 1.0
sigma_data = 1.0
# reports
log_every = 51_200
save_every = 2_560_000
preview_every = 12_800_000
