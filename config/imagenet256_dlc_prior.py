"""The SEDD prior for config/imagenet256_dlc.py: the medium network of Lou et al. (2024), with their batch, learning
rate and warm-up. DLC trains it for 1.3 to 1.5 million steps. (For the small network: 12 layers, width 768, 12 heads.)"""
out_dir = "out/imagenet256_dlc"
prior = "sedd"
layers = 24
dim = 1024
heads = 16
total_images = 716_800_000  # 1.4 million steps
batch_size = 512
lr = 3e-4
warmup_images = 1_280_000
log_every = 1_024_000
save_every = 5_120_000
