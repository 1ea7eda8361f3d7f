"""DICOM objects without anything that identifies a person, a place or a date."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from adregnet_jax.data.dicom.headers import OUR_NAME, OVERLAY_GROUPS, PATIENT_GROUPS, complete_study
from adregnet_jax.provenance import __version__

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

# Attributes that anonymous objects must have too, with values that say nothing.
REPLACED = {"ContentDate": "20000101", "ContentTime": "000000", "StructureSetLabel": "ANONYMOUS"}
# Anonymous objects keep numbers, codes and pixels, and text only in these attributes, whose words are ours or
# those of the standard.
PLAIN_TEXT = {
    "CodeMeaning",
    "CodeValue",
    "CodingSchemeDesignator",
    "ContentDescription",
    "ConvolutionKernel",
    "DerivationDescription",
    "DoseComment",
    "DeidentificationMethod",
    "Manufacturer",
    "ManufacturerModelName",
    "ROIName",
    "RescaleType",
    "SeriesDescription",
    "SoftwareVersions",
}
# Emptied rather than removed, since they must be there.
EMPTIED = {
    "OperatorsName",
    "PositionReferenceIndicator",
    "ROIInterpreter",
    "StructureSetDate",
    "StructureSetTime",
}
TEXT_VRS = {"AE", "AS", "DA", "DT", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UN", "UR", "UT"}
# Identifying although they are numbers or codes: request, visit, procedure and work lists; overlays.
IDENTIFYING_GROUPS = (0x0032, 0x0038, 0x0040, 0x4008)
STANDARD_UID = "1.2.840.10008."  # classes, transfer syntaxes, coding schemes
SHORTEST_FRAGMENT = 3  # letters of a patient's name that make the name of a structure identifying


def anonymous(dataset: Dataset) -> Dataset:
    """A copy without anything that identifies a person, a place or a date.

    Numbers, codes and pixels stay, and text in `PLAIN_TEXT`. UIDs are replaced by hashes of them, except
    those of the standard, so that anonymous objects refer to each other as the originals do.
    """
    fragments = _fragments(dataset)
    dataset = copy.deepcopy(dataset)  # elements may be shared with the headers of a series
    required = [keyword for keyword in REPLACED if keyword in dataset]
    serial = "DeviceSerialNumber" if dataset.get("Manufacturer") == OUR_NAME else None
    _anonymize_items(dataset, fragments, keep={serial} if serial else set())
    for keyword in required:
        setattr(dataset, keyword, REPLACED[keyword])
    complete_study(dataset)
    dataset.PatientName = "ANONYMOUS^PATIENT"
    dataset.PatientID = "ANONYMOUS"
    dataset.PatientIdentityRemoved = "YES"
    dataset.DeidentificationMethod = f"{OUR_NAME} {__version__}: only numbers, codes and pixels kept"
    dataset.LongitudinalTemporalInformationModified = "REMOVED"
    return dataset


def _anonymize_items(dataset: Dataset, fragments: Sequence[str], keep: Collection[str]) -> None:
    for element in list(dataset):
        group = element.tag.group
        identifying = group in (*PATIENT_GROUPS, *IDENTIFYING_GROUPS) or group in OVERLAY_GROUPS
        identifying &= element.keyword != "PurposeOfReferenceCodeSequence"  # (0040,A170)
        text = element.VR in TEXT_VRS and element.keyword not in PLAIN_TEXT
        if element.keyword in keep:
            continue
        if element.keyword in EMPTIED:
            element.value = None
        elif identifying or text or element.tag.is_private or element.keyword == "IconImageSequence":
            del dataset[element.tag]
        elif element.VR == "SQ":
            for item in element.value:
                _anonymize_items(item, fragments, keep)
        elif element.VR == "UI":
            element.value = _anonymous_uids(element.value)
        elif element.keyword == "ROIName" and any(part in element.value.lower() for part in fragments):
            element.value = f"ROI {dataset.get('ROINumber', '')}".strip()


def _anonymous_uids(value: Any) -> Any:
    from pydicom.uid import generate_uid

    if not value:
        return value
    if not isinstance(value, str):
        return [_anonymous_uids(each) for each in value]
    return value if value.startswith(STANDARD_UID) else str(generate_uid(entropy_srcs=[str(value)]))


def _fragments(dataset: Dataset) -> list[str]:
    """Parts of the patient's name and number, in lower case."""
    text = " ".join(str(dataset.get(keyword, "")) for keyword in ("PatientName", "PatientID"))
    parts = re.split(r"[\W_]+", text.lower())
    return [part for part in parts if len(part) >= SHORTEST_FRAGMENT]
