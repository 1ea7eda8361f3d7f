"""Files of DICOM objects, read and written by pydicom.

pydicom is an extra: `pip install 'adregnet-jax[dicom]'`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adregnet_jax.data.dicom.anonymity import anonymous
from adregnet_jax.errors import UserError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset


def pydicom(path: str | Path) -> Any:
    """The module pydicom; if it is missing, a UserError explains how to install it."""
    try:
        import pydicom
    except ImportError:
        raise UserError(f"{path}: this needs pydicom: pip install 'adregnet-jax[dicom]'") from None
    # Archives hold values that break the standard's rules; its warnings would print them, names included.
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    return pydicom


def read_object(path: Path, *kinds: str) -> Dataset:
    """Reads one DICOM file of certain modalities, such as RTSTRUCT; its elements are parsed on use.

    Raises:
      UserError: it isn't a DICOM file, is damaged, or has another modality.
    """
    module = pydicom(path)
    kind = " or ".join(kinds)
    try:
        dataset = module.dcmread(path)
        modality = dataset.get("Modality")
    except (module.errors.InvalidDicomError, EOFError, ValueError, AttributeError, NotImplementedError):
        raise UserError(f"{path}: not a DICOM file that can be read; expected {kind}") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror or error}): check the file") from None
    if modality not in kinds:
        raise UserError(f"{path}: its modality is {modality or 'missing'}; expected {kind}")
    return dataset


def write_object(path: Path, dataset: Dataset, *, anonymize: bool) -> None:
    """Writes a dataset as a DICOM file, explicit little endian, without private attributes.

    Args:
      path: the file.
      dataset: complete; its private attributes are removed.
      anonymize: keep nothing that identifies: see `anonymous`.
    """
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    _remove_private(dataset)
    if anonymize:
        dataset = anonymous(dataset)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.save_as(path, enforce_file_format=True, little_endian=True, implicit_vr=False)


def _remove_private(dataset: Dataset) -> None:
    """Removes private attributes, also within sequences, without parsing the others."""
    for tag in list(dataset.keys()):
        if tag.is_private:
            del dataset[tag]
        elif dataset.get_item(tag).VR in ("SQ", None) and dataset[tag].VR == "SQ":
            for item in dataset[tag].value:
                _remove_private(item)


def decimals(values: np.ndarray, tag: int, *, digits: int) -> Any:
    """An element with decimal strings (DS), without pydicom's check of each, which takes seconds."""
    from pydicom.dataelem import RawDataElement
    from pydicom.tag import Tag

    text = "\\".join([f"{value:.{digits}f}" for value in (values.round(digits) + 0.0).ravel().tolist()])
    content = (text + " " * (len(text) % 2)).encode("ascii")
    return RawDataElement(Tag(tag), "DS", len(content), content, 0, False, True)


def numbers(dataset: Dataset, keyword: str) -> np.ndarray:
    """The numbers of an attribute of decimal strings, without pydicom's parsing of each."""
    from pydicom.dataelem import RawDataElement

    element = dataset.get_item(keyword)
    value = element.value if isinstance(element, RawDataElement) else None
    if isinstance(value, bytes):
        return np.array(value.decode("ascii").strip(" \0").split("\\"), float)
    return np.atleast_1d(np.array(dataset[keyword].value, float))
