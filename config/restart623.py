"""Restart sampling in 623 evaluations, for sample.py: ImageNet-64 settings of Xu et al. (2023a). They
gave DisCo-Diff its best FID."""
num_steps = 36
restarts = ((10, 3, 19.35, 40.79), (10, 3, 1.09, 1.92), (7, 6, 0.59, 1.09), (7, 6, 0.30, 0.59), (7, 25, 0.06, 0.30))
gamma = 0.05
S_min = 0.01
S_max = 1.0
S_noise = 1.003
