"""The course around the package: exercises, their check, the notebooks' builder and their trainer.

Nothing of the mathematics or the training imports this; it looks at them from outside.
"""

import warnings

# tqdm's complaint in a kernel without ipywidgets; the progress shown here needs none.
warnings.filterwarnings("ignore", message="IProgress not found")
