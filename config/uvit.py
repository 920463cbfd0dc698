"""A small U-ViT on the embedded data: convolutional blocks at 28 and 14 pixels, 6 layers of width 128 at 7.

    python train_stage1.py config/uvit.py
    python train_prior.py --out_dir=out/uvit
    python sample.py --out_dir=out/uvit
"""
out_dir = "out/uvit"
denoiser = "uvit"
channel_mult = (1, 2, 8)
depth = 6
dropout = 0.0
