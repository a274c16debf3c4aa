//! Which drive a controller is, as it tells people: model, serial number and size. The device
//! server lists it; no guest depends on it.

use super::super::description::NamespaceFormat;

/// What a controller says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// The model number; empty if it gives none.
    pub model: String,
    /// The serial number; empty if it gives none.
    pub serial: String,
    /// Bytes of all namespaces that are lent, together.
    pub capacity: u64,
    /// Bytes of a logical block of the first of them.
    pub block_size: Option<u32>,
}

impl Identity {
    /// From the Identify Controller data (NVMe 1.4 §5.15.2.2: serial number at 4, model number
    /// at 24).
    pub(super) fn of_controller(data: &[u8]) -> Self {
        Self {
            serial: text(data.get(4..24)),
            model: text(data.get(24..64)),
            capacity: 0,
            block_size: None,
        }
    }

    /// Adds a namespace, from its Identify data (NVMe 1.4 §5.15.2.1: size in blocks at 0).
    pub(super) fn add_namespace(&mut self, format: NamespaceFormat, data: &[u8]) {
        let blocks = data
            .first_chunk()
            .map_or(0, |size| u64::from_le_bytes(*size));
        let bytes = blocks.saturating_mul(1 << format.block_shift);
        self.capacity = self.capacity.saturating_add(bytes);
        self.block_size.get_or_insert(1 << format.block_shift);
    }
}

/// An ASCII field, which ends in spaces (NVMe 1.4 §1.5). What a device says that is not
/// printable is no text.
fn text(field: Option<&[u8]>) -> String {
    let field = field.unwrap_or_default();
    let printable = field.iter().filter(|byte| (b' '..=b'~').contains(*byte));
    let text: String = printable.map(|byte| char::from(*byte)).collect();
    text.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_trimmed_and_printable() {
        let mut data = vec![b' '; 4096];
        data[4..9].copy_from_slice(b"S\x1b[1\0");
        data[24..31].copy_from_slice(b"Model X");
        let identity = Identity::of_controller(&data);
        assert_eq!(identity.serial, "S[1");
        assert_eq!(identity.model, "Model X");
        assert_eq!(Identity::of_controller(&[]), Identity::default());
    }

    #[test]
    fn absurd_sizes_do_not_wrap() {
        let format = NamespaceFormat {
            nsid: 1,
            block_shift: 12,
        };
        let mut identity = Identity::default();
        identity.add_namespace(format, &8_u64.to_le_bytes());
        assert_eq!(
            (identity.capacity, identity.block_size),
            (32768, Some(4096))
        );
        identity.add_namespace(format, &[0xff; 8]);
        assert_eq!(identity.capacity, u64::MAX);
        identity.add_namespace(format, &[]);
        assert_eq!(identity.capacity, u64::MAX);
    }
}
