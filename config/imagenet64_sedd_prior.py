"""The SEDD prior for config/imagenet64.py. Sizes and optimisation (batch 512, 3e-4, 2,500 steps of
warm-up, no weight decay) are from the small network of Lou et al. (2024); label_drop and the length
of training are our guess."""
out_dir = "out/imagenet64"
prior = "sedd"
layers = 12
dim = 768
heads = 12
total_images = 200_000_000
batch_size = 512
lr = 3e-4
warmup_images = 1_280_000
log_every = 10_000_000
save_every = 10_000_000
