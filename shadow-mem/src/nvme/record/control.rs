//! The bytes of what is set up: numbers and byte strings, one after the other.

use super::RecordError;

/// Writes them.
#[derive(Default)]
pub(crate) struct ControlWriter(Vec<u8>);

impl ControlWriter {
    pub(crate) fn number(&mut self, value: u64) -> &mut Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.number(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
        self
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        self.0
    }
}

/// Reads them.
pub(crate) struct ControlReader<'a>(pub(crate) &'a [u8]);

impl<'a> ControlReader<'a> {
    pub(crate) fn number(&mut self) -> Result<u64, RecordError> {
        let (number, rest) = self
            .0
            .split_first_chunk()
            .ok_or(RecordError::Broken("it ends too early"))?;
        self.0 = rest;
        Ok(u64::from_le_bytes(*number))
    }

    /// A number that fits.
    pub(crate) fn small<T: TryFrom<u64>>(&mut self) -> Result<T, RecordError> {
        T::try_from(self.number()?).map_err(|_| RecordError::Broken("a number is too large"))
    }

    pub(crate) fn bytes(&mut self) -> Result<&'a [u8], RecordError> {
        let len: usize = self.small()?;
        let broken = RecordError::Broken("a string ends too early");
        let (bytes, rest) = self.0.split_at_checked(len).ok_or(broken)?;
        self.0 = rest;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_was_written_is_read(number in any::<u64>(), text in proptest::collection::vec(any::<u8>(), 0..50)) {
            let mut writer = ControlWriter::default();
            writer.number(number).bytes(&text);
            let bytes = writer.finish();
            let mut reader = ControlReader(&bytes);
            prop_assert_eq!(reader.number().unwrap(), number);
            prop_assert_eq!(reader.bytes().unwrap(), &text);
            prop_assert!(reader.number().is_err());
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            let mut reader = ControlReader(&bytes);
            while reader.bytes().is_ok() {}
        }
    }
}
