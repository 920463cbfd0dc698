"""The prior for config/cifar10.py."""
out_dir = "out/cifar10"
layers = 6
dim = 256
heads = 8
total_images = 10_000_000
batch_size = 1000
lr = 5e-4
warmup_images = 200_000
log_every = 500_000
save_every = 2_000_000
