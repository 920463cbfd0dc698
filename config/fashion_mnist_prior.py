"""The prior for config/fashion_mnist.py."""
out_dir = "out/fashion_mnist"
total_images = 1_000_000
batch_size = 500
log_every = 50_000
save_every = 500_000
