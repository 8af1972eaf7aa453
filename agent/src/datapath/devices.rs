//! What an enrolled pod's namespace holds besides the programs: the pair `mesh0`/`mesh1`, one
//! policy rule and one local route per family.
//!
//! [`ensure`] reads what the kernel has, mends what differs and says what it mended; [`remove`]
//! takes away exactly this and nothing else. Both run on a thread inside the pod's namespace.
//! Everything is set by netlink, because /proc/sys is read-only in a container.
//!
//! How a captured packet comes through: tc gives it the capture mark and mesh0 as its device; the
//! rule leads the mark to our table; the table says that every address is local; `sk_lookup`
//! finds the listener by the device. So the devices need no address, but they must accept
//! sources that are local (`accept_local`) or come from elsewhere (`rp_filter` 2, loose). Their
//! MTU is the largest there is: a redirected packet that is longer than its device's MTU is lost
//! without a trace, and they set no MSS, because nothing is ever routed out through them.
//!
//! Knows neither programs nor sockets.

use std::io;

use nix::libc;
use picomesh_common::config::{
    MESH0_IFINDEX, MESH0_MAC, MESH0_NAME, MESH1_IFINDEX, MESH1_MAC, MESH1_NAME, ROUTE_TABLE,
    RULE_PRIORITY,
};

use super::{
    loader::{Interface, L2_ETHERNET, L2_NONE},
    netlink::{self, Message, Netlink, attribute, attributes, text, u16_at, u32_at},
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
    let mut links = links(&mut netlink)?;

    let lo = links.iter().find(|link| link.loopback);
    let ipv6 = lo.is_some_and(|lo| lo.ipv6_disabled == Some(false));
    let lo_index = lo.map_or(1, |lo| lo.index);
    if lo.is_none_or(|lo| !lo.up) {
        // The runtime brings it up before a container starts; without it a local route is dead.
        set_flags(
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
            delete_link(&mut netlink, stray.index)?;
        }
        create_pair(&mut netlink).map_err(failed("create mesh0 and mesh1"))?;
        repaired.push("devices");
        links = self::links(&mut netlink)?;
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
            configure(&mut netlink, device, owner, link.ipv6_disabled.is_some())
                .map_err(failed("configure mesh0 and mesh1"))?;
            if !repaired.contains(&"devices") {
                repaired.push("device_settings");
            }
        }
        if !link.up {
            set_flags(
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
            enable_ipv6(device.name)?;
            repaired.push("device_ipv6");
        }
    }

    for family in families(ipv6) {
        ensure_rule(&mut netlink, family, capture_mark, &mut repaired)?;
        ensure_route(&mut netlink, family, lo_index, &mut repaired)?;
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
        for rule in rules(&mut netlink, family)?
            .into_iter()
            .filter(Rule::is_ours)
        {
            ignore_gone(netlink.change(rule.message(libc::RTM_DELRULE, 0)))
                .map_err(failed("remove the policy rule"))?;
        }
        for route in routes(&mut netlink, family)? {
            ignore_gone(netlink.change(route.message(libc::RTM_DELROUTE, 0)))
                .map_err(failed("remove the local route"))?;
        }
    }
    let links = links(&mut netlink)?;
    for link in links.iter().filter(|link| {
        in_our_place(link) && (owner.on_record || link.alias.as_deref() == Some(&owner.alias))
    }) {
        delete_link(&mut netlink, link.index)?;
    }
    Ok(())
}

/// The interfaces of the calling thread's namespace that get programs: all but lo and ours. One
/// without Ethernet header counts only while it is up, because the kernel puts the idle fallback
/// devices of its tunnel modules (tunl0, sit0 …) into every namespace.
pub fn interfaces() -> Result<Vec<Interface>, DevicesError> {
    Ok(captured(&links(&mut open()?)?))
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

const MTU: u32 = 65_535;
const RP_FILTER_LOOSE: u32 = 2;
const ADDR_GEN_MODE_NONE: u8 = 1;
/// Marks rules and routes as ours (`ip rule` and `ip route` show it as `proto 112`); a number
/// that iproute2's list leaves free.
const PROTOCOL: u8 = 112;

struct Device {
    index: u32,
    name: &'static str,
    mac: [u8; 6],
    accept_local: u32,
}

const OURS: [Device; 2] = [
    // What the pod itself sends arrives here, from the pod's own address.
    Device {
        index: MESH0_IFINDEX,
        name: MESH0_NAME,
        mac: MESH0_MAC,
        accept_local: 1,
    },
    Device {
        index: MESH1_IFINDEX,
        name: MESH1_NAME,
        mac: MESH1_MAC,
        accept_local: 0,
    },
];

impl Device {
    fn is(&self, link: &Link) -> bool {
        link.index == self.index && link.name == self.name && link.veth
    }
}

/// An interface as the kernel describes it.
#[derive(Debug, Default)]
struct Link {
    index: u32,
    name: String,
    loopback: bool,
    ethernet: bool,
    up: bool,
    multicast: bool,
    veth: bool,
    mac: [u8; 6],
    mtu: u32,
    alias: Option<String>,
    rp_filter: u32,
    accept_local: u32,
    /// `None`: no IPv6 on it at all.
    ipv6_disabled: Option<bool>,
    addr_gen_mode: Option<u8>,
}

fn in_our_place(link: &Link) -> bool {
    OURS.iter()
        .any(|device| device.index == link.index || device.name == link.name)
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

// ---- links ----

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

fn links(netlink: &mut Netlink) -> Result<Vec<Link>, DevicesError> {
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
    Ok(links)
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

fn create_pair(netlink: &mut Netlink) -> io::Result<()> {
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
fn configure(
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

fn set_flags(netlink: &mut Netlink, index: u32, flags: u32, change: u32) -> io::Result<()> {
    netlink.change(Message::new(
        libc::RTM_NEWLINK,
        0,
        &ifinfo(index, flags, change),
    ))
}

/// Deleting one end deletes the other.
fn delete_link(netlink: &mut Netlink, index: u32) -> Result<(), DevicesError> {
    ignore_gone(netlink.change(Message::new(libc::RTM_DELLINK, 0, &ifinfo(index, 0, 0))))
        .map_err(failed("remove mesh0 and mesh1"))
}

/// The one setting without a netlink attribute. Works where /proc/sys is writable; elsewhere the
/// user is told.
fn enable_ipv6(device: &'static str) -> Result<(), DevicesError> {
    std::fs::write(
        format!("/proc/sys/net/ipv6/conf/{device}/disable_ipv6"),
        "0",
    )
    .map_err(|_| DevicesError::Ipv6Disabled { device })
}

// ---- policy rules ----

// Of linux/fib_rules.h.
const FRA_PRIORITY: u16 = 6;
const FRA_FWMARK: u16 = 10;
const FRA_TABLE: u16 = 15;
const FRA_FWMASK: u16 = 16;
const FRA_PROTOCOL: u16 = 21;
const FR_ACT_TO_TBL: u8 = 1;

#[derive(Clone, Debug, PartialEq, Eq)]
struct Rule {
    family: u8,
    priority: u32,
    mark: u32,
    mask: u32,
    table: u32,
    protocol: u8,
}

impl Rule {
    fn ours(family: u8, mark: u32) -> Self {
        Self {
            family,
            priority: RULE_PRIORITY,
            mark,
            mask: u32::MAX,
            table: ROUTE_TABLE,
            protocol: PROTOCOL,
        }
    }

    /// Of this agent or of one that drew another mark.
    fn is_ours(&self) -> bool {
        self.protocol == PROTOCOL && self.table == ROUTE_TABLE
    }

    fn message(&self, kind: u16, flags: i32) -> Message {
        let mut header = [0; 12];
        header[0] = self.family;
        header[7] = FR_ACT_TO_TBL;
        Message::new(kind, flags, &header)
            .attr_u32(FRA_PRIORITY, self.priority)
            .attr_u32(FRA_FWMARK, self.mark)
            .attr_u32(FRA_FWMASK, self.mask)
            .attr_u32(FRA_TABLE, self.table)
            .attr(FRA_PROTOCOL, &[self.protocol])
    }
}

fn rules(netlink: &mut Netlink, family: u8) -> Result<Vec<Rule>, DevicesError> {
    let mut header = [0; 12];
    header[0] = family;
    let mut rules = Vec::new();
    let result = netlink.dump(Message::new(libc::RTM_GETRULE, 0, &header), |kind, body| {
        if kind != libc::RTM_NEWRULE || body.len() < 12 || body[0] != family {
            return;
        }
        let number = |kind| attribute(&body[12..], kind).map_or(0, |value| u32_at(value, 0));
        rules.push(Rule {
            family,
            priority: number(FRA_PRIORITY),
            mark: number(FRA_FWMARK),
            mask: number(FRA_FWMASK),
            table: number(FRA_TABLE),
            protocol: attribute(&body[12..], FRA_PROTOCOL).map_or(0, |v| v[0]),
        });
    });
    // Without IPv6 the kernel does not know the family, or answers for another.
    ignore_gone(result).map_err(failed("list the policy rules"))?;
    Ok(rules)
}

fn ensure_rule(
    netlink: &mut Netlink,
    family: u8,
    mark: u32,
    repaired: &mut Vec<&'static str>,
) -> Result<(), DevicesError> {
    let wanted = Rule::ours(family, mark);
    let mut found = false;
    for rule in rules(netlink, family)? {
        if rule == wanted && !found {
            found = true;
        } else if rule.is_ours() {
            ignore_gone(netlink.change(rule.message(libc::RTM_DELRULE, 0)))
                .map_err(failed("remove a stale policy rule"))?;
            repaired.push("stale_rule");
        }
    }
    if !found {
        let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
        netlink
            .change(wanted.message(libc::RTM_NEWRULE, flags))
            .map_err(failed("add the policy rule"))?;
        repaired.push("rule");
    }
    Ok(())
}

// ---- routes of our table ----

const RT_TABLE_COMPAT: u8 = 252;

#[derive(Clone, Debug, PartialEq, Eq)]
struct Route {
    family: u8,
    destination_length: u8,
    destination: Vec<u8>,
    kind: u8,
    scope: u8,
    interface: u32,
}

impl Route {
    fn ours(family: u8, lo: u32) -> Self {
        Self {
            family,
            destination_length: 0,
            destination: Vec::new(),
            kind: libc::RTN_LOCAL,
            // IPv6 knows no scopes and always shows this one.
            scope: if i32::from(family) == libc::AF_INET {
                libc::RT_SCOPE_HOST
            } else {
                libc::RT_SCOPE_UNIVERSE
            },
            interface: lo,
        }
    }

    fn message(&self, kind: u16, flags: i32) -> Message {
        let mut header = [0; 12];
        header[0] = self.family;
        header[1] = self.destination_length;
        header[4] = RT_TABLE_COMPAT;
        header[5] = PROTOCOL;
        header[6] = self.scope;
        header[7] = self.kind;
        let mut message = Message::new(kind, flags, &header).attr_u32(libc::RTA_TABLE, ROUTE_TABLE);
        if !self.destination.is_empty() {
            message = message.attr(libc::RTA_DST, &self.destination);
        }
        if self.interface != 0 {
            message = message.attr_u32(libc::RTA_OIF, self.interface);
        }
        message
    }
}

/// The routes of our table that carry our protocol number.
fn routes(netlink: &mut Netlink, family: u8) -> Result<Vec<Route>, DevicesError> {
    let mut header = [0; 12];
    header[0] = family;
    let mut routes = Vec::new();
    let result = netlink.dump(
        Message::new(libc::RTM_GETROUTE, 0, &header),
        |kind, body| {
            if kind != libc::RTM_NEWROUTE || body.len() < 12 || body[0] != family {
                return;
            }
            let of = |kind| attribute(&body[12..], kind);
            if of(libc::RTA_TABLE).map(|table| u32_at(table, 0)) == Some(ROUTE_TABLE)
                && body[5] == PROTOCOL
            {
                routes.push(Route {
                    family,
                    destination_length: body[1],
                    destination: of(libc::RTA_DST).unwrap_or_default().to_vec(),
                    kind: body[7],
                    scope: body[6],
                    interface: of(libc::RTA_OIF).map_or(0, |index| u32_at(index, 0)),
                });
            }
        },
    );
    ignore_gone(result).map_err(failed("list the routes"))?;
    Ok(routes)
}

fn ensure_route(
    netlink: &mut Netlink,
    family: u8,
    lo: u32,
    repaired: &mut Vec<&'static str>,
) -> Result<(), DevicesError> {
    let wanted = Route::ours(family, lo);
    let found = routes(netlink, family)?;
    for stale in found.iter().filter(|route| **route != wanted) {
        ignore_gone(netlink.change(stale.message(libc::RTM_DELROUTE, 0)))
            .map_err(failed("remove a stale local route"))?;
        repaired.push("stale_route");
    }
    if !found.contains(&wanted) {
        // Replacing, because a route of another protocol may be in its place.
        let flags = libc::NLM_F_CREATE | libc::NLM_F_REPLACE;
        netlink
            .change(wanted.message(libc::RTM_NEWROUTE, flags))
            .map_err(failed("add the local route"))?;
        repaired.push("route");
    }
    Ok(())
}
