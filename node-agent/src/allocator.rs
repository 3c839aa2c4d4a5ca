//! What the allocator holds, and what for.

use mesh_telemetry::metric;
use serde::Serialize;
use tikv_jemalloc_ctl::{Error, epoch, stats};

/// The allocator's own counts, bytes. Source: jemalloc(3), `stats.*`.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct AllocatorBytes {
    /// Asked for by the program and not given back.
    allocated: usize,
    /// In pages of which at least one byte is allocated: beyond `allocated` it is fragmentation.
    active: usize,
    /// The allocator's own bookkeeping.
    metadata: usize,
    /// In physical memory: active, metadata, and pages that are not given back to the kernel yet.
    resident: usize,
    /// Address space of what is active or may be again.
    mapped: usize,
    /// Address space that is kept without memory behind it.
    retained: usize,
}

impl AllocatorBytes {
    /// The counts of this moment.
    ///
    /// # Errors
    /// When the allocator keeps none.
    pub(crate) fn now() -> Result<Self, Error> {
        // The counts are those of the last epoch.
        epoch::advance()?;
        Ok(Self {
            allocated: stats::allocated::read()?,
            active: stats::active::read()?,
            metadata: stats::metadata::read()?,
            resident: stats::resident::read()?,
            mapped: stats::mapped::read()?,
            retained: stats::retained::read()?,
        })
    }

    /// Sets the gauges.
    pub(crate) fn observe(self) {
        for (kind, bytes) in [
            ("allocated", self.allocated),
            ("active", self.active),
            ("metadata", self.metadata),
            ("resident", self.resident),
            ("mapped", self.mapped),
            ("retained", self.retained),
        ] {
            #[expect(clippy::cast_precision_loss, reason = "Prometheus values are floating point")]
            metrics::gauge!(metric::MEMORY_BYTES.name, "kind" => kind).set(bytes as f64);
        }
    }
}
