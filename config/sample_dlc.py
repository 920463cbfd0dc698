"""Taken to be DLC's row of Table 1 without guidance (FID 2.00), for sample.py: codes by 4,096 steps of SEDD with
remasking.

DLC's program has two sets of settings for 50,000 images, and does not say which row each is for; this one has no
guidance. The images come from 250 steps of DDPM there, from 249 evaluations of EDM's sampler here.
"""
out_dir = "out/imagenet256_dlc"
num_images = 50_000
per_code = 1
batch_size = 64
guidance = 1.0
prior = "sedd"
sedd_sampler = "analytic"
sedd_steps = 4096
eta = 0.01
t0 = 0.3
t1 = 0.55
num_steps = 125
sigma_min = 0.004  # as EDM2's: of latents whose sigma_data is twice as large
sigma_max = 160.0
