//! Sets of a volume's copies, or of an attachment's connections to them.

use super::ids::{COPIES_MAX, LINKS_MAX};

/// A set of copies by their place in the record, or of links (see [`LINKS_MAX`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct CopySet(pub u16);

const _: () = assert!(LINKS_MAX <= u16::BITS as usize);

impl CopySet {
    /// None.
    pub const EMPTY: Self = Self(0);

    /// Just this one.
    pub fn one(copy: usize) -> Self {
        Self(1 << copy)
    }

    /// Whether `copy` is in it.
    pub fn has(self, copy: usize) -> bool {
        self.0 & (1 << copy) != 0
    }

    /// Both sets' common members.
    pub fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// The members of either.
    pub fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Without `other`'s members.
    pub fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Adds `copy`.
    pub fn insert(&mut self, copy: usize) {
        self.0 |= 1 << copy;
    }

    /// Removes `copy`.
    pub fn remove(&mut self, copy: usize) {
        self.0 &= !(1 << copy);
    }

    /// No member.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Members.
    pub fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    /// The members, lowest first.
    pub fn iter(self) -> impl Iterator<Item = usize> {
        (0..LINKS_MAX).filter(move |c| self.has(*c))
    }

    /// The bulk links of these copies.
    pub fn bulk(self) -> Self {
        Self(self.0 << COPIES_MAX)
    }
}

impl FromIterator<usize> for CopySet {
    fn from_iter<T: IntoIterator<Item = usize>>(copies: T) -> Self {
        let mut set = Self::EMPTY;
        copies.into_iter().for_each(|c| set.insert(c));
        set
    }
}
