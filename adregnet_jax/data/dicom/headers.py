"""The parts that all written DICOM objects share: patient, study, references, new identifiers, anonymity.

pydicom is an extra: `pip install 'adregnet-jax[dicom]'`.
"""

from __future__ import annotations

import copy
import datetime
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adregnet_jax.errors import UserError
from adregnet_jax.provenance import __version__

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

PATIENT_GROUPS = (0x0010, 0x0012)  # patient and clinical trial
STUDY = (
    "SpecificCharacterSet",
    "StudyInstanceUID",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
    "StudyID",
    "AccessionNumber",
    "StudyDescription",
)
# Attributes that a study must have, if only empty.
EXPECTED = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
    "StudyID",
    "AccessionNumber",
)
# Attributes that anonymous objects must have too, with values that say nothing.
REPLACED = {"ContentDate": "20000101", "ContentTime": "000000", "StructureSetLabel": "ANONYMOUS"}
OUR_NAME = "adregnet"

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
OVERLAY_GROUPS = range(0x6000, 0x6100)
STANDARD_UID = "1.2.840.10008."  # classes, transfer syntaxes, coding schemes
SHORTEST_FRAGMENT = 3  # letters of a patient's name that make the name of a structure identifying


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


def of_patient_and_study(source: Dataset) -> Dataset:
    """A new dataset with the patient and the study of another one."""
    from pydicom.dataset import Dataset

    kept = Dataset()
    for element in source:
        patient = element.tag.group in PATIENT_GROUPS
        if not element.tag.is_private and (patient or element.keyword in STUDY):
            kept.add(element)
    complete_study(kept)
    return kept


def with_patient_and_study(source: Dataset, header: Dataset, *, without: Collection[str]) -> Dataset:
    """A copy of a dataset that belongs to the patient and the study of another one.

    Args:
      source: the dataset to copy; its text must have been decoded, as `remove_private_tags` does.
      header: has the patient and the study.
      without: attributes of the source that are left out.
    """
    from pydicom.dataset import Dataset

    made = Dataset()
    for element in source:
        patient = element.tag.group in PATIENT_GROUPS
        if not (patient or element.tag.is_private or element.keyword in (*STUDY, *without)):
            made.add(copy.deepcopy(element))
    study = of_patient_and_study(header)
    for element in study:
        made.add(copy.deepcopy(element))
    if source.get("SpecificCharacterSet") != header.get("SpecificCharacterSet"):
        made.SpecificCharacterSet = "ISO_IR 192"  # holds the texts of both
    return made


def complete_study(dataset: Dataset) -> None:
    """Adds what patient and study must have, empty where it is missing."""
    for keyword in EXPECTED:
        if keyword not in dataset:
            setattr(dataset, keyword, "")


def identify(dataset: Dataset, *, sop_class: str, series: str, number: int, description: str) -> None:
    """Makes a dataset a new instance of a series of ours, made now.

    Args:
      dataset: changed in place.
      sop_class: UID of its class.
      series: UID of its series.
      number: of the series.
      description: of the series.
    """
    date, time = now()
    dataset.SOPClassUID = sop_class
    dataset.SOPInstanceUID = new_uid()
    dataset.InstanceCreationDate, dataset.InstanceCreationTime = date, time
    dataset.SeriesInstanceUID = series
    dataset.SeriesNumber = number
    dataset.SeriesDescription = description
    dataset.SeriesDate, dataset.SeriesTime = date, time
    if "BodyPartExamined" not in dataset and "Laterality" not in dataset:
        dataset.Laterality = ""  # must be there unless the body part is known to be unpaired


def new_uid() -> str:
    """A new identifier."""
    from pydicom.uid import generate_uid

    return str(generate_uid())


def now() -> tuple[str, str]:
    """Date and time as DICOM writes them."""
    moment = datetime.datetime.now()
    return f"{moment:%Y%m%d}", f"{moment:%H%M%S}"


def add_equipment(dataset: Dataset) -> None:
    """Names this program as the equipment that made an object."""
    dataset.Manufacturer = OUR_NAME
    dataset.ManufacturerModelName = OUR_NAME
    dataset.SoftwareVersions = __version__
    dataset.DeviceSerialNumber = "none"


def code(value: str, meaning: str, *, scheme: str = "DCM") -> Dataset:
    """An item of a code sequence."""
    from pydicom.dataset import Dataset

    item = Dataset()
    item.CodeValue = value
    item.CodingSchemeDesignator = scheme
    item.CodeMeaning = meaning
    return item


def reference(instance: Dataset) -> Dataset:
    """An item that refers to an instance."""
    from pydicom.dataset import Dataset

    item = Dataset()
    item.ReferencedSOPClassUID = instance.SOPClassUID
    item.ReferencedSOPInstanceUID = instance.SOPInstanceUID
    return item


def add_instance_references(dataset: Dataset, instances: Iterable[Dataset]) -> None:
    """Fills the module Common Instance Reference: every referenced instance, by study and series."""
    from pydicom.dataset import Dataset

    studies: dict[str, dict[str, dict[str, Dataset]]] = {}
    for instance in instances:
        series = studies.setdefault(instance.StudyInstanceUID, {})
        series.setdefault(instance.SeriesInstanceUID, {})[instance.SOPInstanceUID] = instance
    others = []
    for study_uid, study in studies.items():
        items = []
        for series_uid, found in study.items():
            item = Dataset()
            item.SeriesInstanceUID = series_uid
            item.ReferencedInstanceSequence = [reference(instance) for instance in found.values()]
            items.append(item)
        if study_uid == dataset.StudyInstanceUID:
            dataset.ReferencedSeriesSequence = items
        else:
            other = Dataset()
            other.StudyInstanceUID = study_uid
            other.ReferencedSeriesSequence = items
            others.append(other)
    if others:
        dataset.StudiesContainingOtherReferencedInstancesSequence = others


def decimal(value: float) -> str:
    """A decimal string (DS) of at most 16 characters."""
    from pydicom.valuerep import format_number_as_ds

    return format_number_as_ds(float(value))


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
    """An element with decimal strings (DS), a hundred thousand in a second, where pydicom parses each."""
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
