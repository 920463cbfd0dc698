"""Restart sampling in 39 evaluations, for sample.py: ImageNet-64 settings of Xu et al. (2023a)."""
num_steps = 14
restarts = ((3, 1, 19.35, 40.79), (3, 1, 1.09, 1.92), (3, 1, 0.06, 0.30))
gamma = 0.05
S_min = 0.01
S_max = 1.0
S_noise = 1.003
