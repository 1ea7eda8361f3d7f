"""The parts that all written DICOM objects share: patient, study, references and new identifiers."""

from __future__ import annotations

import copy
import datetime
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

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
OUR_NAME = "adregnet"
SERIES_NUMBERS = 1000  # added to the number of the series that an object comes from
OVERLAY_GROUPS = range(0x6000, 0x6100)


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
