"""Taken to be DLC's row of Table 1 with guidance (FID 1.59), for sample.py: codes by 1,024 steps of SEDD without
remasking. See sample_dlc.py.

DLC's cfg of 1.7 is our w, at all noise levels. The paper guides the first three channels of the latents alone, a
leftover from DiT; DLC's program guides all four, and so does this one.
"""
out_dir = "out/imagenet256_dlc"
name = "guided"
num_images = 50_000
per_code = 1
batch_size = 64
guidance = 1.7
prior = "sedd"
sedd_sampler = "analytic"
sedd_steps = 1024
num_steps = 125
sigma_min = 0.004
sigma_max = 160.0
