"""The temperatures of Table 4, as the release has them: translation, rotation, torsions.

They were tuned with the release's rotation noise, which is sqrt(2) times ours.
"""
out_dir = "out/pdbbind"
num_samples = 40
num_steps = 20
prior_temperature = 4.48
tau = (1.547, 4.005, 3.650)
psi = (1.269, 1.276, 2.063)
sigma_data = (0.846, 0.453, 0.329)
