"""Use a trained model: score the test images and draw panels, or segment any file or folder.

    python predict.py                                  the run's test images: results/<stem>.png, results/metrics.csv
    python predict.py --data-dir DIR                   every pair of another data set, likewise
    python predict.py --model "files/run/fold*/model.h5" …             several models, averaged
    python predict.py --input PATH --output DIR        masks DIR/<stem>.png, panels DIR/panels/<stem>.png

Masks have the image's own size and kind: PNG or TIFF (0/255 for one class), NIfTI, DICOM SEG, with the
training masks' values. A bad file is reported and the others are done; the exit code is then 2.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


BUNDLED_MODEL = "files/lungs/unet.onnx"  # made of files/lungs.h5
