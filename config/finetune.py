"""Fine-tuning without class labels, as compare_models.py does it.

    python train_stage1.py config/finetune.py --init_from=out/edm --out_dir=out/finetuned
"""
out_dir = "out/finetuned"
class_cond = False
