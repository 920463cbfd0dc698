"""The text model in pretrained-dlc/: 1.5 times as wide as the default, with three times as many captions.

    python train_text.py config/pretrained_text.py
"""
out_dir = "out/pretrained-dlc"
dim = 96
hidden = 240
total_images = 640_000
