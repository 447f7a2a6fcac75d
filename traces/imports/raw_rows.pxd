# SPDX-License-Identifier: Apache-2.0
from traces.imports.raw_records cimport u16, u32, u64
