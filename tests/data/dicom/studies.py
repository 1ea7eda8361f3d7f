"""Small DICOM studies, made by pydicom alone: CT series, structures and a dose."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

STUDY, FRAME, OTHER_FRAME = "1.2.3.4", "1.2.3.5", "1.2.3.6"
PATIENT, BORN = "Rosenkrantz^Wilhelmina", "19551231"


def header(modality, series, *, patient=PATIENT, study=STUDY):
    """Patient, study, series and equipment."""
    made = Dataset()
    made.SpecificCharacterSet = "ISO_IR 100"
    made.PatientName, made.PatientID, made.PatientBirthDate, made.PatientSex = patient, "QZ77431", BORN, "F"
    made.PatientAge = "068Y"
    made.StudyInstanceUID, made.StudyDate, made.StudyTime = study, "20240518", "101112"
    made.ReferringPhysicianName, made.StudyID, made.AccessionNumber = "Guildenstern", "ST9", "AC998877"
    made.StudyDescription = "Thorax of Rosenkrantz"
    made.Modality, made.SeriesInstanceUID, made.SeriesNumber = modality, series, 3
    made.SeriesDescription = "phase 50"
    made.Manufacturer, made.ManufacturerModelName = "Vendor", "Scanner 1"
    made.InstitutionName, made.DeviceSerialNumber = "Elsinore Hospital", "SN556677"
    made.OperatorsName = "Polonius"
    return made


def save(path, made):
    path.parent.mkdir(parents=True, exist_ok=True)
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.save_as(path, enforce_file_format=True)


def write_ct(folder, values, lps, *, frame=FRAME, series=None, **of_header):
    """A series with values [x, y, z], whole HU, on the grid `lps` [4, 4] voxel -> LPS mm."""
    series = series or generate_uid()
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    axes = lps[:3, :3] / spacing
    for k in range(values.shape[2]):
        made = header("CT", series, **of_header)
        made.SOPClassUID, made.SOPInstanceUID = CTImageStorage, f"{series[:56]}.{k + 1}"
        made.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        made.FrameOfReferenceUID, made.PositionReferenceIndicator = frame, ""
        made.PatientPosition = "HFS"
        made.AcquisitionNumber, made.InstanceNumber = 1, k + 1
        made.AcquisitionDate, made.AcquisitionTime = "20240518", f"10{k // 60:02d}{k % 60:02d}"
        made.KVP, made.XRayTubeCurrent = "120", 100 + k
        made.ImagePositionPatient = [f"{x:.10g}" for x in lps[:3, 2] * k + lps[:3, 3]]
        made.ImageOrientationPatient = [f"{x:.10f}" for x in axes[:, :2].T.ravel()]
        made.PixelSpacing = [spacing[1], spacing[0]]
        made.SliceThickness = f"{spacing[2]:.6g}"
        made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
        made.Rows, made.Columns = values.shape[1], values.shape[0]
        made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelRepresentation = 16, 12, 11, 0
        made.RescaleIntercept, made.RescaleSlope, made.RescaleType = "-1024", "1", "HU"
        made.WindowCenter, made.WindowWidth = "40", "400"
        made.PixelData = (values[..., k].T + 1024).astype("<u2").tobytes()
        made["PixelData"].VR = "OW"
        made.add_new(0x00091010, "LO", "private: Rosenkrantz")
        made.add_new(0x00090010, "LO", "VENDOR")
        save(folder / f"im{values.shape[2] - k:03d}.dcm", made)
    return folder


def write_rtstruct(path, structures, slices, *, frame=FRAME, kind="CLOSED_PLANAR", **of_header):
    """Structures, as (name, colour, contours [n, 3] LPS mm, type of region), on the slices of a series."""
    made = header("RTSTRUCT", generate_uid(), **of_header)
    made.SpecificCharacterSet = "ISO_IR 192"
    made.SOPClassUID, made.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.481.3", generate_uid()
    made.StructureSetLabel, made.StructureSetDate, made.StructureSetTime = "Plan R", "20240519", "090000"
    made.FrameOfReferenceUID, made.PositionReferenceIndicator = frame, ""
    made.Laterality = ""
    series = Dataset()
    series.SeriesInstanceUID = slices[0].SeriesInstanceUID
    series.ContourImageSequence = []
    for image in slices:
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = image.SOPClassUID, image.SOPInstanceUID
        series.ContourImageSequence.append(item)
    study, of_frame = Dataset(), Dataset()
    study.ReferencedSOPClassUID, study.ReferencedSOPInstanceUID = "1.2.840.10008.3.1.2.3.1", STUDY
    study.RTReferencedSeriesSequence = [series]
    of_frame.FrameOfReferenceUID, of_frame.RTReferencedStudySequence = frame, [study]
    made.ReferencedFrameOfReferenceSequence = [of_frame]
    made.StructureSetROISequence, made.ROIContourSequence, made.RTROIObservationsSequence = [], [], []
    for number, (name, colour, contours, interpreted) in enumerate(structures, 11):
        roi, drawn, seen = Dataset(), Dataset(), Dataset()
        roi.ROINumber, roi.ReferencedFrameOfReferenceUID, roi.ROIName = number, frame, name
        roi.ROIGenerationAlgorithm = "MANUAL"
        drawn.ReferencedROINumber, drawn.ROIDisplayColor, drawn.ContourSequence = number, colour, []
        for corners in contours:
            item = Dataset()
            item.ContourGeometricType = "POINT" if len(corners) == 1 else kind
            item.NumberOfContourPoints = len(corners)
            item.ContourData = np.round(corners, 4).ravel().tolist()
            drawn.ContourSequence.append(item)
        seen.ObservationNumber, seen.ReferencedROINumber = number, number
        seen.RTROIInterpretedType, seen.ROIInterpreter = interpreted, "Polonius"
        made.StructureSetROISequence.append(roi)
        made.ROIContourSequence.append(drawn)
        made.RTROIObservationsSequence.append(seen)
    save(path, made)
    return path


def write_fiducials(path, points, *, frame=FRAME, shape="POINT"):
    """Spatial Fiducials: points in LPS mm by name."""
    made = header("FID", generate_uid())
    made.SOPClassUID, made.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.66.2", generate_uid()
    made.ContentDate, made.ContentTime, made.ContentLabel = "20240519", "090000", "POINTS"
    made.ContentDescription, made.ContentCreatorName, made.InstanceNumber = "", "", 1
    group = Dataset()
    group.FrameOfReferenceUID, group.FiducialSequence = frame, []
    for name, point in points.items():
        item = Dataset()
        item.FiducialIdentifier, item.ShapeType = name, shape
        item.NumberOfContourPoints, item.ContourData = 1, list(point)
        group.FiducialSequence.append(item)
    made.FiducialSetSequence = [group]
    save(path, made)
    return path


def write_rtdose(path, doses, lps, *, scaling, frame=FRAME, bits=32, **of_header):
    """A dose in Gy, [x, y, z] on the axial grid `lps` [4, 4] voxel -> LPS mm."""
    made = header("RTDOSE", generate_uid(), **of_header)
    made.SOPClassUID, made.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.481.2", generate_uid()
    made.FrameOfReferenceUID, made.PositionReferenceIndicator = frame, ""
    made.InstanceNumber = 1
    made.ImagePositionPatient = lps[:3, 3].tolist()
    made.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    made.PixelSpacing, made.SliceThickness = [lps[1, 1], lps[0, 0]], lps[2, 2]
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
    made.NumberOfFrames, made.FrameIncrementPointer = doses.shape[2], 0x3004000C
    made.GridFrameOffsetVector = (lps[2, 2] * np.arange(doses.shape[2])).tolist()
    made.Rows, made.Columns = doses.shape[1], doses.shape[0]
    made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelRepresentation = bits, bits, bits - 1, 0
    made.DoseUnits, made.DoseType, made.DoseSummationType = "GY", "PHYSICAL", "PLAN"
    made.DoseComment = "Dose of Rosenkrantz"
    plan = Dataset()
    plan.ReferencedSOPClassUID, plan.ReferencedSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.481.5", "1.2.3.77"
    made.ReferencedRTPlanSequence = [plan]
    made.DoseGridScaling = scaling
    made.Laterality = ""
    made.PixelData = np.round(doses / scaling).transpose(2, 1, 0).astype(f"<u{bits // 8}").tobytes()
    made["PixelData"].VR = "OW"
    save(path, made)
    return path


def headers_of(folder):
    """The slices of a series, in the order of their positions."""
    return sorted(map(pydicom.dcmread, folder.iterdir()), key=lambda image: image.InstanceNumber)


def problems(path):
    """What dciodvfy calls an error in a DICOM file."""
    done = subprocess.run(["dciodvfy", str(path)], capture_output=True, check=False)
    printed = (done.stdout + done.stderr).decode(errors="replace")  # with values of the file, in its encoding
    return [line for line in printed.splitlines() if re.match("error", line, re.I)]


def needs(program):
    """Skips a test where a program isn't installed."""
    package = {"dciodvfy": "dicom3tools", "dcmdump": "dcmtk", "dsrdump": "dcmtk"}.get(program, program)
    if not shutil.which(program):
        pytest.skip(f"needs {program}: apt-get install {package}")


def written(folder: Path):
    return sorted(path for path in folder.rglob("*.dcm"))
