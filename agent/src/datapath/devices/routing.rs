//! The policy rule that leads the capture mark to our table, and the table's one route.

use nix::libc;
use picomesh_common::config::{ROUTE_TABLE, RULE_PRIORITY};

use super::{
    super::netlink::{Message, Netlink, attribute, u32_at},
    DevicesError, failed, ignore_gone,
};

/// Marks rules and routes as ours (`ip rule` and `ip route` show it as `proto 112`); a number
/// that iproute2's list leaves free.
const PROTOCOL: u8 = 112;

// Of linux/fib_rules.h.
const FRA_PRIORITY: u16 = 6;
const FRA_FWMARK: u16 = 10;
const FRA_TABLE: u16 = 15;
const FRA_FWMASK: u16 = 16;
const FRA_PROTOCOL: u16 = 21;
const FR_ACT_TO_TBL: u8 = 1;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rule {
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
    pub(super) fn is_ours(&self) -> bool {
        self.protocol == PROTOCOL && self.table == ROUTE_TABLE
    }

    pub(super) fn message(&self, kind: u16, flags: i32) -> Message {
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

pub(super) fn rules(netlink: &mut Netlink, family: u8) -> Result<Vec<Rule>, DevicesError> {
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

pub(super) fn ensure_rule(
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

const RT_TABLE_COMPAT: u8 = 252;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Route {
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

    pub(super) fn message(&self, kind: u16, flags: i32) -> Message {
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
pub(super) fn routes(netlink: &mut Netlink, family: u8) -> Result<Vec<Route>, DevicesError> {
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

pub(super) fn ensure_route(
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
