"""The prior for config/imagenet64.py: 12 layers, width 512, 8 heads, as in the paper (App. D.1). The
paper does not say how it was optimised; these values are usual for a Transformer of this size."""
out_dir = "out/imagenet64"
layers = 12
dim = 512
heads = 8
label_drop = 0.0  # the paper's prior always knows the class
total_images = 400_000_000
batch_size = 2048
lr = 3e-4
warmup_images = 2_000_000
log_every = 10_000_000
save_every = 10_000_000
