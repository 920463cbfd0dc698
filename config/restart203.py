"""Restart sampling in 203 evaluations, for sample.py: ImageNet-64 settings of Xu et al. (2023a)."""
num_steps = 36
restarts = ((4, 1, 19.35, 40.79), (4, 1, 1.09, 1.92), (4, 5, 0.59, 1.09), (4, 5, 0.30, 0.59), (6, 6, 0.06, 0.30))
gamma = 0.05
S_min = 0.01
S_max = 1.0
S_noise = 1.003
