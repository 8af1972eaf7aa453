//! The interfaces of a namespace, and how `mesh0` and `mesh1` are made and set, as netlink messages.

use std::io;

use nix::libc;
use picomesh_common::config::{
    MESH0_IFINDEX, MESH0_MAC, MESH0_NAME, MESH1_IFINDEX, MESH1_MAC, MESH1_NAME,
};

use super::{
    super::netlink::{Message, Netlink, attribute, attributes, text, u16_at, u32_at},
    DeviceOwner, DevicesError, failed, ignore_gone,
};

pub(super) const MTU: u32 = 65_535;
pub(super) const RP_FILTER_LOOSE: u32 = 2;
pub(super) const ADDR_GEN_MODE_NONE: u8 = 1;
pub(super) struct Device {
    pub(super) index: u32,
    pub(super) name: &'static str,
    pub(super) mac: [u8; 6],
    pub(super) accept_local: u32,
    /// The kernel drops what comes in on a device without any IPv4 address as soon as rp_filter
    /// is on, loose or not, and `all` may have it on. A loopback address of scope host serves: it
    /// is never a source, never routed, never announced.
    pub(super) address: [u8; 4],
}

pub(super) const OURS: [Device; 2] = [
    // What the pod itself sends arrives here, from the pod's own address.
    Device {
        index: MESH0_IFINDEX,
        name: MESH0_NAME,
        mac: MESH0_MAC,
        accept_local: 1,
        address: [127, 112, 109, 1],
    },
    Device {
        index: MESH1_IFINDEX,
        name: MESH1_NAME,
        mac: MESH1_MAC,
        accept_local: 0,
        address: [127, 112, 109, 2],
    },
];

impl Device {
    pub(super) fn is(&self, link: &Link) -> bool {
        link.index == self.index && link.name == self.name && link.veth
    }
}

/// An interface as the kernel describes it.
#[derive(Debug, Default)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) loopback: bool,
    pub(super) ethernet: bool,
    pub(super) up: bool,
    pub(super) multicast: bool,
    pub(super) veth: bool,
    pub(super) mac: [u8; 6],
    pub(super) mtu: u32,
    pub(super) alias: Option<String>,
    pub(super) addresses: Vec<[u8; 4]>,
    pub(super) rp_filter: u32,
    pub(super) accept_local: u32,
    /// `None`: no IPv6 on it at all.
    pub(super) ipv6_disabled: Option<bool>,
    pub(super) addr_gen_mode: Option<u8>,
}

// Of linux/if_link.h, linux/ip.h and linux/ipv6.h.
const IFLA_INET_CONF: u16 = 1;
const IFLA_INET6_CONF: u16 = 2;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const VETH_INFO_PEER: u16 = 1;
const IPV4_DEVCONF_RP_FILTER: u16 = 8;
const IPV4_DEVCONF_ACCEPT_LOCAL: u16 = 23;
const IPV6_DEVCONF_DISABLE_IPV6: usize = 26;
const RTEXT_FILTER_SKIP_STATS: u32 = 1 << 3;

fn ifinfo(index: u32, flags: u32, change: u32) -> [u8; 16] {
    let mut header = [0; 16];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..12].copy_from_slice(&flags.to_ne_bytes());
    header[12..16].copy_from_slice(&change.to_ne_bytes());
    header
}

pub(super) fn links(netlink: &mut Netlink) -> Result<Vec<Link>, DevicesError> {
    let mut links = Vec::new();
    let request = Message::new(libc::RTM_GETLINK, 0, &ifinfo(0, 0, 0))
        .attr_u32(libc::IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS);
    netlink
        .dump(request, |kind, body| {
            if kind == libc::RTM_NEWLINK && body.len() >= 16 {
                links.push(parse_link(body));
            }
        })
        .map_err(failed("list the interfaces"))?;
    let request = Message::new(libc::RTM_GETADDR, 0, &ifaddr(0, 0));
    netlink
        .dump(request, |kind, body| {
            if kind == libc::RTM_NEWADDR && body.len() >= 8 {
                let address = attribute(&body[8..], libc::IFA_LOCAL).unwrap_or_default();
                let link: Option<&mut Link> =
                    links.iter_mut().find(|link| link.index == u32_at(body, 4));
                if let (Some(link), Ok(address)) = (link, address.try_into()) {
                    link.addresses.push(address);
                }
            }
        })
        .map_err(failed("list the addresses"))?;
    Ok(links)
}

fn ifaddr(index: u32, prefix: u8) -> [u8; 8] {
    let mut header = [
        libc::AF_INET as u8,
        prefix,
        0,
        libc::RT_SCOPE_HOST,
        0,
        0,
        0,
        0,
    ];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header
}

fn parse_link(body: &[u8]) -> Link {
    let (kind, index, flags) = (u16_at(body, 2), u32_at(body, 4), u32_at(body, 8));
    let mut link = Link {
        index,
        loopback: flags & libc::IFF_LOOPBACK as u32 != 0,
        ethernet: kind == libc::ARPHRD_ETHER,
        up: flags & libc::IFF_UP as u32 != 0,
        multicast: flags & libc::IFF_MULTICAST as u32 != 0,
        ..Link::default()
    };
    for (kind, value) in attributes(&body[16..]) {
        match kind {
            libc::IFLA_IFNAME => link.name = text(value),
            libc::IFLA_IFALIAS => link.alias = Some(text(value)),
            libc::IFLA_MTU => link.mtu = u32_at(value, 0),
            libc::IFLA_ADDRESS => link.mac = value.try_into().unwrap_or_default(),
            libc::IFLA_LINKINFO => {
                link.veth =
                    attribute(value, libc::IFLA_INFO_KIND).is_some_and(|kind| text(kind) == "veth");
            }
            libc::IFLA_AF_SPEC => parse_families(value, &mut link),
            _ => {}
        }
    }
    link
}

fn parse_families(value: &[u8], link: &mut Link) {
    for (family, settings) in attributes(value) {
        if i32::from(family) == libc::AF_INET {
            // An array that begins with setting 1.
            let conf = attribute(settings, IFLA_INET_CONF).unwrap_or_default();
            let setting = |number: u16| u32_at(conf, (usize::from(number) - 1) * 4);
            link.rp_filter = setting(IPV4_DEVCONF_RP_FILTER);
            link.accept_local = setting(IPV4_DEVCONF_ACCEPT_LOCAL);
        } else if i32::from(family) == libc::AF_INET6 {
            let conf = attribute(settings, IFLA_INET6_CONF).unwrap_or_default();
            link.ipv6_disabled = Some(u32_at(conf, IPV6_DEVCONF_DISABLE_IPV6 * 4) != 0);
            link.addr_gen_mode = attribute(settings, IFLA_INET6_ADDR_GEN_MODE)
                .and_then(|mode| mode.first().copied());
        }
    }
}

pub(super) fn create_pair(netlink: &mut Netlink) -> io::Result<()> {
    fn common(message: Message, device: &Device) -> Message {
        message
            .attr_str(libc::IFLA_IFNAME, device.name)
            .attr(libc::IFLA_ADDRESS, &device.mac)
            .attr_u32(libc::IFLA_MTU, MTU)
            // One queue: the default is one per possible CPU, per pod.
            .attr_u32(libc::IFLA_NUM_TX_QUEUES, 1)
            .attr_u32(libc::IFLA_NUM_RX_QUEUES, 1)
    }
    let [first, second] = &OURS;
    let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    let message = Message::new(libc::RTM_NEWLINK, flags, &ifinfo(first.index, 0, 0));
    let message = common(message, first).nest(libc::IFLA_LINKINFO, &[], |info| {
        info.attr_str(libc::IFLA_INFO_KIND, "veth")
            .nest(libc::IFLA_INFO_DATA, &[], |data| {
                data.nest(VETH_INFO_PEER, &ifinfo(second.index, 0, 0), |peer| {
                    common(peer, second)
                })
            })
    });
    netlink.change(message)
}

/// All settings but "up", which must come last so that the device never speaks.
pub(super) fn configure(
    netlink: &mut Netlink,
    device: &Device,
    owner: &DeviceOwner,
    ipv6: bool,
) -> io::Result<()> {
    let header = ifinfo(device.index, 0, libc::IFF_MULTICAST as u32);
    let message = Message::new(libc::RTM_NEWLINK, 0, &header)
        .attr_str(libc::IFLA_IFALIAS, &owner.alias)
        .attr(libc::IFLA_ADDRESS, &device.mac)
        .attr_u32(libc::IFLA_MTU, MTU)
        .nest(libc::IFLA_AF_SPEC, &[], |spec| {
            let spec = spec.nest(libc::AF_INET as u16, &[], |inet| {
                inet.nest(IFLA_INET_CONF, &[], |conf| {
                    conf.attr_u32(IPV4_DEVCONF_RP_FILTER, RP_FILTER_LOOSE)
                        .attr_u32(IPV4_DEVCONF_ACCEPT_LOCAL, device.accept_local)
                })
            });
            if !ipv6 {
                return spec;
            }
            spec.nest(libc::AF_INET6 as u16, &[], |inet6| {
                inet6.attr(IFLA_INET6_ADDR_GEN_MODE, &[ADDR_GEN_MODE_NONE])
            })
        });
    netlink.change(message)
}

pub(super) fn add_address(netlink: &mut Netlink, device: &Device) -> io::Result<()> {
    let flags = libc::NLM_F_CREATE | libc::NLM_F_REPLACE;
    netlink.change(
        Message::new(libc::RTM_NEWADDR, flags, &ifaddr(device.index, 32))
            .attr(libc::IFA_LOCAL, &device.address)
            .attr(libc::IFA_ADDRESS, &device.address),
    )
}

pub(super) fn set_flags(
    netlink: &mut Netlink,
    index: u32,
    flags: u32,
    change: u32,
) -> io::Result<()> {
    netlink.change(Message::new(
        libc::RTM_NEWLINK,
        0,
        &ifinfo(index, flags, change),
    ))
}

/// Deleting one end deletes the other.
pub(super) fn delete_link(netlink: &mut Netlink, index: u32) -> Result<(), DevicesError> {
    ignore_gone(netlink.change(Message::new(libc::RTM_DELLINK, 0, &ifinfo(index, 0, 0))))
        .map_err(failed("remove mesh0 and mesh1"))
}

/// The one setting without a netlink attribute. Works where /proc/sys is writable; elsewhere the
/// user is told.
pub(super) fn enable_ipv6(device: &'static str) -> Result<(), DevicesError> {
    std::fs::write(
        format!("/proc/sys/net/ipv6/conf/{device}/disable_ipv6"),
        "0",
    )
    .map_err(|_| DevicesError::Ipv6Disabled { device })
}
