"""Audit the 253 real images and write benchmarks/audit_real.json, which nbs/02_review.ipynb prints.

    BRAIN_VIT_DATA=../brain_tumor_dataset python benchmarks/audit_real.py
"""
import os
import sys
import time
from pathlib import Path

from brain_vit._base import write_json
from brain_vit.review import audit, audit_table

if "BRAIN_VIT_DATA" not in os.environ:
    sys.exit("Set BRAIN_VIT_DATA to the folder with 'yes' and 'no'.")
start = time.perf_counter()
report = audit(os.environ["BRAIN_VIT_DATA"])
write_json(Path(__file__).with_suffix(".json"), report)
print(audit_table(report))
print(f"{time.perf_counter() - start:.1f} s")
