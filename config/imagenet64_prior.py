"""The prior of config/imagenet64.py: the paper's 12 layers, width 512, 8 heads (App. D.1). The paper does not
say how it was optimised; these are usual values for a Transformer of this size."""
out_dir = "out/imagenet64"
layers = 12
dim = 512
heads = 8
label_drop = 0.0  # in the paper it always knows the class
total_images = 400_000_000
batch_size = 2048
lr = 3e-4
warmup_images = 2_000_000
log_every = 10_000_000
save_every = 10_000_000
