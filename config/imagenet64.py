"""ImageNet-64, class-conditional: the paper's settings (App. D.1, D.2); the denoiser's are EDM's.

    python data.py imagenet64 --source=ILSVRC/Data/CLS-LOC/train --resolution=64
    torchrun --nproc_per_node=8 train_stage1.py config/imagenet64.py
    torchrun --nproc_per_node=8 train_prior.py config/imagenet64_prior.py
    torchrun --nproc_per_node=8 sample.py --out_dir=out/imagenet64 --num_images=50000 --per_code=1 \
        --num_steps=40 --batch_size=256

The paper starts from EDM's trained network; this file trains from scratch. Heun's sampler with 40
steps costs 79 evaluations; the paper's table says 78.
"""
out_dir = "out/imagenet64"
dataset = "imagenet64"
held_out = 5_000
# denoiser: 295.9 M parameters, and 21.2 M of cross-attention
model_channels = 192
channel_mult = (1, 2, 3, 4)
channel_mult_emb = 4
num_blocks = 3
attn_resolutions = (32, 16, 8)
dropout = 0.1
# discrete latents
num_latents = 10
codebook_size = 100  # sec. 4.1; App. D.1 says 1000
tau = 1.0
null_prob = 0.1
latent_dim = 192
latent_layers = 6
latent_heads = 3
latents_to_emb = False
# encoder: ViT-B/8
encoder_patch = 8
encoder_dim = 768
encoder_layers = 12
encoder_heads = 12
coarse_images = 0
# optimisation
total_images = 2_500_000_000
batch_size = 4096
batch_gpu = 128
lr = 1e-4
encoder_lr = 1e-4
warmup_images = 10_000_000
ema_halflife_images = 50_000_000
ema_rampup = 0.05
P_mean = -1.2
P_std = 1.2
sigma_data = 0.5
# reports
log_every = 200_000
save_every = 5_000_000
preview_every = 10_000_000
