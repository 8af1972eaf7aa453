//! Ranges of ports in a snapshot, `[[22, 22], [4000, 4100]]`: their type is the kernel's, and that
//! crate depends on nothing.

use picomesh_common::PortRange;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

pub(super) fn serialize<S: Serializer>(
    ranges: &Option<Vec<PortRange>>,
    to: S,
) -> Result<S::Ok, S::Error> {
    let pairs = ranges.as_ref();
    let pairs: Option<Vec<_>> = pairs.map(|ranges| ranges.iter().map(pair).collect());
    pairs.serialize(to)
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(
    from: D,
) -> Result<Option<Vec<PortRange>>, D::Error> {
    let pairs = Option::<Vec<(u16, u16)>>::deserialize(from)?;
    Ok(pairs.map(|pairs| pairs.into_iter().map(range).collect()))
}

/// The same for one that must be there.
pub(super) mod one {
    use super::*;

    pub(in super::super) fn serialize<S: Serializer>(
        range: &PortRange,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        pair(range).serialize(to)
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<PortRange, D::Error> {
        <(u16, u16)>::deserialize(from).map(range)
    }
}

fn pair(range: &PortRange) -> (u16, u16) {
    (range.first, range.last)
}

fn range((first, last): (u16, u16)) -> PortRange {
    PortRange { first, last }
}
