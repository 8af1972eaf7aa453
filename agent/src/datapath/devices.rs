//! What an enrolled pod's namespace holds besides the programs: the pair `mesh0`/`mesh1`, one
//! policy rule and one local route per family.
//!
//! [`ensure`] reads what the kernel has, mends what differs and says what it mended; [`remove`]
//! takes away exactly this and nothing else. Both run on a thread inside the pod's namespace.
//! Everything is set by netlink, because /proc/sys is read-only in a container.
//!
//! How a captured packet comes through: tc gives it the capture mark and mesh0 as its device; the
//! rule leads the mark to our table; the table says that every address is local; `sk_lookup`
//! finds the listener by the device. So the devices must accept sources that are local
//! (`accept_local`) or come from elsewhere (`rp_filter` 2, loose, which also outweighs a strict
//! `all`; for this alone they have an address). Their MTU is the largest there is: a redirected packet that is longer than its device's MTU is lost
//! without a trace, and they set no MSS, because nothing is ever routed out through them.
//!
//! Knows neither programs nor sockets.

mod links;
mod routing;

use std::io;

use nix::libc;

use self::{
    links::{ADDR_GEN_MODE_NONE, Link, MTU, OURS, RP_FILTER_LOOSE},
    routing::Rule,
};
use super::{
    loader::{Interface, L2_ETHERNET, L2_NONE},
    netlink::{self, Netlink},
};

/// Whose devices these are, written into their alias: a namespace that another agent (or another
/// pod of ours) has enrolled already is left alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceOwner {
    /// The kernel keeps 255 bytes of it.
    pub alias: String,
    /// An enrolment of this very namespace by this very owner is on record, so what lies under
    /// our names or indexes is ours, whatever became of it.
    pub on_record: bool,
}

/// What the namespace looks like after [`ensure`].
#[derive(Debug)]
pub struct Ensured {
    /// What differed, one fixed word each; all of them on the first time.
    pub repaired: Vec<&'static str>,
    pub interfaces: Vec<Interface>,
    /// IPv6 is there and enabled, so the pod gets IPv6 listeners.
    pub ipv6: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum DevicesError {
    #[error("{what} in the pod's netns: {source}")]
    Netlink {
        what: &'static str,
        source: io::Error,
    },
    #[error(
        "interface {name} (ifindex {index}) is in the pod's netns and is not ours; rename it or \
         give it another index"
    )]
    Conflict { name: String, index: u32 },
    #[error("the pod's netns belongs to `{alias}` already; a netns can belong to one pod only")]
    Taken { alias: String },
    #[error(
        "the pod has an IPv6 address, but IPv6 is disabled on {device}; allow it with \
         net.ipv6.conf.default.disable_ipv6=0 before the pod starts"
    )]
    Ipv6Disabled { device: &'static str },
}

impl DevicesError {
    /// The fixed word for metrics and status.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Netlink { .. } => "netlink",
            Self::Conflict { .. } => "device_conflict",
            Self::Taken { .. } => "netns_taken",
            Self::Ipv6Disabled { .. } => "ipv6_disabled",
        }
    }
}

/// Makes devices, rules and routes as they should be, in the calling thread's namespace.
pub fn ensure(owner: &DeviceOwner, capture_mark: u32) -> Result<Ensured, DevicesError> {
    let mut netlink = open()?;
    let mut repaired = Vec::new();
    let mut links = links::links(&mut netlink)?;

    let lo = links.iter().find(|link| link.loopback);
    let ipv6 = lo.is_some_and(|lo| lo.ipv6_disabled == Some(false));
    let lo_index = lo.map_or(1, |lo| lo.index);
    if lo.is_none_or(|lo| !lo.up) {
        // The runtime brings it up before a container starts; without it a local route is dead.
        links::set_flags(
            &mut netlink,
            lo_index,
            libc::IFF_UP as u32,
            libc::IFF_UP as u32,
        )
        .map_err(failed("bring up lo"))?;
        repaired.push("lo");
    }

    if !pair_is_ours(&links, owner)? {
        for stray in links.iter().filter(|link| in_our_place(link)) {
            links::delete_link(&mut netlink, stray.index)?;
        }
        links::create_pair(&mut netlink).map_err(failed("create mesh0 and mesh1"))?;
        repaired.push("devices");
        links = links::links(&mut netlink)?;
    }
    for (device, link) in OURS
        .iter()
        .filter_map(|device| Some((device, links.iter().find(|l| device.is(l))?)))
    {
        if link.alias.as_deref() != Some(owner.alias.as_str())
            || link.mac != device.mac
            || link.mtu != MTU
            || link.multicast
            || link.rp_filter != RP_FILTER_LOOSE
            || link.accept_local != device.accept_local
            || (link.ipv6_disabled.is_some() && link.addr_gen_mode != Some(ADDR_GEN_MODE_NONE))
        {
            links::configure(&mut netlink, device, owner, link.ipv6_disabled.is_some())
                .map_err(failed("configure mesh0 and mesh1"))?;
            if !repaired.contains(&"devices") {
                repaired.push("device_settings");
            }
        }
        if !link.addresses.contains(&device.address) {
            links::add_address(&mut netlink, device).map_err(failed("address mesh0 and mesh1"))?;
            if !repaired.contains(&"devices") {
                repaired.push("device_address");
            }
        }
        if !link.up {
            links::set_flags(
                &mut netlink,
                device.index,
                libc::IFF_UP as u32,
                libc::IFF_UP as u32,
            )
            .map_err(failed("bring up mesh0 and mesh1"))?;
            if !repaired.contains(&"devices") {
                repaired.push("device_down");
            }
        }
        if ipv6 && link.ipv6_disabled == Some(true) {
            links::enable_ipv6(device.name)?;
            repaired.push("device_ipv6");
        }
    }

    for family in families(ipv6) {
        routing::ensure_rule(&mut netlink, family, capture_mark, &mut repaired)?;
        routing::ensure_route(&mut netlink, family, lo_index, &mut repaired)?;
    }
    Ok(Ensured {
        repaired,
        interfaces: captured(&links),
        ipv6,
    })
}

/// Takes away what [`ensure`] made, in the calling thread's namespace. What is gone already is
/// no error; devices under our names that carry another owner's alias stay.
pub fn remove(owner: &DeviceOwner) -> Result<(), DevicesError> {
    let mut netlink = open()?;
    for family in families(true) {
        for rule in routing::rules(&mut netlink, family)?
            .into_iter()
            .filter(Rule::is_ours)
        {
            ignore_gone(netlink.change(rule.message(libc::RTM_DELRULE, 0)))
                .map_err(failed("remove the policy rule"))?;
        }
        for route in routing::routes(&mut netlink, family)? {
            ignore_gone(netlink.change(route.message(libc::RTM_DELROUTE, 0)))
                .map_err(failed("remove the local route"))?;
        }
    }
    let links = links::links(&mut netlink)?;
    for link in links.iter().filter(|link| {
        in_our_place(link) && (owner.on_record || link.alias.as_deref() == Some(&owner.alias))
    }) {
        links::delete_link(&mut netlink, link.index)?;
    }
    Ok(())
}

/// The interfaces of the calling thread's namespace that get programs: all but lo and ours. One
/// without Ethernet header counts only while it is up, because the kernel puts the idle fallback
/// devices of its tunnel modules (tunl0, sit0 …) into every namespace.
pub fn interfaces() -> Result<Vec<Interface>, DevicesError> {
    Ok(captured(&links::links(&mut open()?)?))
}

fn captured(links: &[Link]) -> Vec<Interface> {
    links
        .iter()
        .filter(|link| !link.loopback && !in_our_place(link))
        .filter(|link| link.ethernet || link.up)
        .map(|link| Interface {
            index: link.index,
            name: link.name.clone(),
            l2_len: if link.ethernet { L2_ETHERNET } else { L2_NONE },
        })
        .collect()
}

fn in_our_place(link: &Link) -> bool {
    OURS.iter()
        .any(|device| device.index == link.index || device.name == link.name)
}

/// Is it the index of mesh0 or mesh1?
pub(super) fn is_our_index(index: u32) -> bool {
    OURS.iter().any(|device| device.index == index)
}

/// True: both are there and ours. False: (re-)create them. Error: somebody else's are there.
fn pair_is_ours(links: &[Link], owner: &DeviceOwner) -> Result<bool, DevicesError> {
    for link in links.iter().filter(|link| in_our_place(link)) {
        if owner.on_record || link.alias.as_deref() == Some(&owner.alias) {
            continue;
        }
        return Err(match &link.alias {
            Some(alias) if alias.starts_with(ALIAS_PREFIX) => DevicesError::Taken {
                alias: alias.clone(),
            },
            Some(_) | None => DevicesError::Conflict {
                name: link.name.clone(),
                index: link.index,
            },
        });
    }
    Ok(OURS
        .iter()
        .all(|device| links.iter().any(|link| device.is(link))))
}

/// Every alias of ours begins so.
pub const ALIAS_PREFIX: &str = "picomesh ";

fn open() -> Result<Netlink, DevicesError> {
    Netlink::open(netlink::ROUTE).map_err(failed("open a netlink socket"))
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> DevicesError {
    move |source| DevicesError::Netlink { what, source }
}

fn families(ipv6: bool) -> impl Iterator<Item = u8> {
    [libc::AF_INET as u8, libc::AF_INET6 as u8]
        .into_iter()
        .take(1 + usize::from(ipv6))
}

fn ignore_gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::ENOENT | libc::ENODEV | libc::ESRCH | libc::EAFNOSUPPORT)
            ) =>
        {
            Ok(())
        }
        other => other,
    }
}
