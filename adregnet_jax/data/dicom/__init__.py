"""DICOM objects of a registration: series, registration objects, structures and doses. NumPy and pydicom."""
