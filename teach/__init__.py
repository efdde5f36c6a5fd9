"""What teachers need: slides, questions, exams, a TA guide. `make teach` builds it all."""

from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
