"""Discrete Latent Codes' encoder on ImageNet: the settings of the authors' program, from DINOv2's ViT-L/14 with
registers. Codes of 512 x 256, and the paper's two other shapes, whose L V is the same:

    python data.py imagenet256 --source=ILSVRC/Data/CLS-LOC/train --resolution=256 \
        --transform=center-crop-dhariwal --vae=sd-vae-ft-ema.safetensors --xflip=True    # as in imagenet256_dlc.py
    curl -O https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_reg4_pretrain.pth
    torchrun --nproc_per_node=4 train_encoder.py config/imagenet_encoder.py
    torchrun --nproc_per_node=4 train_encoder.py config/imagenet_encoder.py --num_latents=128 --codebook_size=1024 \
        --out_dir=out/imagenet_dlc128
    torchrun --nproc_per_node=4 train_encoder.py config/imagenet_encoder.py --num_latents=32 --codebook_size=4096 \
        --out_dir=out/imagenet_dlc32

The paper (sec. 5) says DINOv2's settings of pre-training, and 100 epochs. The published file has others: DINOv2's
defaults, with centring, one head, and epochs of 1,250 steps. Where they differ, this is the file, except for
the blur: DINOv2's class turns its probability round, and these are the probabilities that were meant.
What our data make different: crops come from the central square at 256 pixels, not from the whole photograph; they are
resized without antialiasing; colours are changed in a fixed order; codes are read from the square at 224 pixels.

Memory in bf16, estimated, not measured on a GPU: 29 GB whatever the batch (1.13 billion parameters: weights, gradients,
two moments, teacher and DDP's buffers of 4 bytes each, and copies in bf16), and 0.3 GB for each image of a process.
So 64 images, of 256 on four GPUs, take 48 GB, and 150 fit into 80 GB. Without `recompute` an image takes 1.1 GB, and
64 don't fit: that needs eight GPUs. The basis: a block keeps 41 kB, counted on a CPU, for each of an image's 954 tokens
(2 crops of 261, 8 of 54), with `recompute` 4 kB; there are 24. To that come 24 bytes for each of 65,536 prototypes, of
about 77 hidden patches and 10 crops, and 12 bytes for each of 131,072 numbers of the SEMs of 10 crops.
"""
out_dir = "out/imagenet_dlc512"
init_from = "dinov2_vitl14_reg4_pretrain.pth"
dataset = "imagenet256"
held_out = 5_000
# codes
num_latents = 512
codebook_size = 256
# encoder: ViT-L/14, 304 M parameters, and 805 M of the SEMs
patch = 14
dim = 1024
layers = 24
heads = 16
registers = 4
stem = 0
layerscale = 1e-5
drop_path = 0.3
recompute = True
mean = (0.485, 0.456, 0.406)
std = (0.229, 0.224, 0.225)
# heads
prototypes = 65_536
head_hidden = 2048
head_bottleneck = 256
shared_head = True
# views
global_size = 224
local_size = 98
local_crops = 8
global_area = (0.32, 1.0)
local_area = (0.05, 0.32)
xflip = True
jitter = (0.4, 0.4, 0.2, 0.1)
jitter_prob = 0.8
grey_prob = 0.2
blur_prob = (1.0, 0.1, 0.5)
blur_sigma = (0.1, 2.0)
solarise_prob = 0.2
# what is learned
targets = "centring"
student_temp = 0.1
teacher_temp = 0.07
teacher_temp_start = 0.04
teacher_temp_images = 9_600_000  # 30 epochs of 1,250 steps
teacher_momentum = 0.992
center_momentum = 0.9
patch_weight = 1.0
koleo_weight = 0.1
mask_share = (0.1, 0.5)
mask_least = 4
# optimisation
total_images = 32_000_000  # 100 epochs of 1,250 steps
batch_size = 256
lr = 5e-5  # 1e-4 sqrt(batch_size / 1024)
lr_end = 1e-6
warmup_images = 3_200_000
weight_decay = 0.04
weight_decay_end = 0.4
layer_decay = 0.9
patch_lr = 0.2
prototypes_held_images = 320_000
grad_clip = 3.0
# reports
log_every = 25_600
save_every = 640_000
