//! Queues by their ids. Walking over them costs what there is, not what there could be: most
//! controllers have a few queues, and data threads look at all of them all the time.

/// Values by small ids.
pub(crate) struct Slots<T> {
    /// No longer than the largest id in use demands.
    slots: Vec<Option<T>>,
    limit: usize,
}

impl<T> Slots<T> {
    /// Room for the ids `0 .. limit`.
    pub(crate) fn new(limit: u16) -> Self {
        let limit = usize::from(limit);
        Self {
            slots: Vec::with_capacity(limit),
            limit,
        }
    }

    /// One more than the largest id in use.
    pub(crate) fn end(&self) -> u16 {
        self.slots.len() as u16
    }

    pub(crate) fn get(&self, id: u16) -> Option<&T> {
        self.slots.get(usize::from(id))?.as_ref()
    }

    pub(crate) fn get_mut(&mut self, id: u16) -> Option<&mut T> {
        self.slots.get_mut(usize::from(id))?.as_mut()
    }

    /// Puts a value under an id, in place of what was there. Ids beyond the limit, which the
    /// caller has refused, have no place.
    pub(crate) fn insert(&mut self, id: u16, value: T) {
        let id = usize::from(id);
        if id >= self.limit {
            return;
        }
        if id >= self.slots.len() {
            self.slots.resize_with(id + 1, || None);
        }
        if let Some(slot) = self.slots.get_mut(id) {
            *slot = Some(value);
        }
    }

    pub(crate) fn remove(&mut self, id: u16) -> Option<T> {
        let removed = self.slots.get_mut(usize::from(id))?.take();
        while let Some(None) = self.slots.last() {
            self.slots.pop();
        }
        removed
    }

    pub(crate) fn clear(&mut self) {
        self.slots.clear();
    }

    /// Ids and values, ascending.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u16, &T)> {
        let numbered = (0..).zip(&self.slots);
        numbered.filter_map(|(id, slot)| Some((id, slot.as_ref()?)))
    }

    /// As [`Self::iter`], from id 1 on: those of I/O queues.
    pub(crate) fn io(&self) -> impl Iterator<Item = (u16, &T)> {
        let numbered = (1..).zip(self.slots.get(1..).unwrap_or_default());
        numbered.filter_map(|(id, slot)| Some((id, slot.as_ref()?)))
    }

    /// As [`Self::io`], to change them.
    pub(crate) fn io_mut(&mut self) -> impl Iterator<Item = (u16, &mut T)> {
        let numbered = (1..).zip(self.slots.get_mut(1..).unwrap_or_default());
        numbered.filter_map(|(id, slot)| Some((id, slot.as_mut()?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_walked_over_is_no_longer_than_what_is_in_use() {
        let mut slots = Slots::new(8);
        assert_eq!(slots.end(), 0);
        slots.insert(0, 'a');
        slots.insert(5, 'b');
        assert_eq!(slots.end(), 6);
        assert_eq!(slots.iter().collect::<Vec<_>>(), [(0, &'a'), (5, &'b')]);
        assert_eq!(slots.remove(5), Some('b'));
        assert_eq!(slots.end(), 1);
        assert_eq!((slots.remove(5), slots.get(0)), (None, Some(&'a')));
        slots.insert(8, 'c');
        assert_eq!(slots.get(8), None);
    }
}
