"""Bad input, made by code: what a user may give by mistake, or with intent, and the line that refuses it.

A case's command runs in the folder that its `make` filled, so paths in it are relative. Some cases hold good
input that looks bad, such as a big-endian file; these have the status 0, and `expected` is in what is
printed.
"""

from tests.bad_inputs.batches import BATCHES
from tests.bad_inputs.evaluation import EVALUATION
from tests.bad_inputs.images import HUGE, ITK, NIFTI
from tests.bad_inputs.landmarks import POINTS
from tests.bad_inputs.readers import READERS
from tests.bad_inputs.register import REGISTER
from tests.bad_inputs.training import TRAINING
from tests.bad_inputs.transforms import TRANSFORMS

CASES = [*NIFTI, *HUGE, *ITK, *POINTS, *TRANSFORMS, *REGISTER, *BATCHES, *TRAINING, *EVALUATION, *READERS]
