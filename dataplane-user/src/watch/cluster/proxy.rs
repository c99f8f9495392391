//! By which proxy the API server is reached: `proxy-url` of the kubeconfig, else that of the environment, as for client-go.
//!
//! `proxy-url` is meant for this server and holds whatever `NO_PROXY` says. `HTTPS_PROXY` (`HTTP_PROXY` for a server without
//! TLS) is for all servers but those in `NO_PROXY`, and never for this machine itself.

use super::ClusterError;
use http::Uri;
use hyper_util::client::proxy::matcher::Matcher;
use std::net::IpAddr;

/// The proxy for this server, and its words for the log, which hold no password.
pub(super) fn choose(stated: Option<&str>, server: &Uri) -> Result<Option<(Uri, String)>, ClusterError> {
    choose_by(stated, server, |name| std::env::var(name).ok())
}

/// What a proxy is named by, where it is not the kubeconfig.
const VARIABLES: [(&str, [&str; 2]); 2] =
    [("https", ["HTTPS_PROXY", "https_proxy"]), ("http", ["HTTP_PROXY", "http_proxy"])];

fn choose_by(
    stated: Option<&str>,
    server: &Uri,
    variable: impl Fn(&str) -> Option<String>,
) -> Result<Option<(Uri, String)>, ClusterError> {
    if let Some(stated) = stated.filter(|stated| !stated.is_empty()) {
        return parse("proxy-url", stated).map(Some);
    }
    let first = |names: [&'static str; 2]| {
        names.into_iter().find_map(|name| Some((name, variable(name).filter(|it| !it.is_empty())?)))
    };
    let names = VARIABLES.into_iter().find(|(scheme, _)| server.scheme_str() == Some(scheme));
    let Some((name, value)) = names.and_then(|(_, names)| first(names)) else { return Ok(None) };
    let excepted = first(["NO_PROXY", "no_proxy"]).map(|(_, value)| value).unwrap_or_default();
    if is_this_machine(server) || !is_meant(server, &excepted) {
        return Ok(None);
    }
    parse(name, &value).map(Some)
}

/// Whether `NO_PROXY` does not name the server.
fn is_meant(server: &Uri, excepted: &str) -> bool {
    if excepted.split(',').any(|entry| entry.trim() == "*") {
        return false;
    }
    // Which proxy is all the same here.
    Matcher::builder().http("http://any").https("http://any").no(excepted).build().intercept(server).is_some()
}

fn is_this_machine(server: &Uri) -> bool {
    let host = server.host().unwrap_or_default().trim_matches(['[', ']']);
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

fn parse(name: &'static str, value: &str) -> Result<(Uri, String), ClusterError> {
    let failed = || ClusterError::Proxy { name };
    let value = match value.split_once("://") {
        // The name of the server is always left to the proxy to look up.
        Some(("socks5h", rest)) => format!("socks5://{rest}"),
        Some(_) => value.to_owned(),
        None => format!("http://{value}"),
    };
    let uri: Uri = value.parse().map_err(|_| failed())?;
    let (Some(scheme @ ("http" | "https" | "socks5")), Some(host)) = (uri.scheme_str(), uri.host()) else {
        return Err(failed());
    };
    let port = uri.port_u16().map(|port| format!(":{port}")).unwrap_or_default();
    let words = format!("the proxy {scheme}://{host}{port} of {name}");
    Ok((uri, words))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(stated: Option<&str>, server: &str, variables: &[(&str, &str)]) -> Option<String> {
        let variable = |name: &str| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        };
        let chosen = choose_by(stated, &server.parse().unwrap(), variable).unwrap();
        chosen.map(|(uri, _)| uri.to_string())
    }

    const SERVER: &str = "https://10.0.0.1:6443";

    #[test]
    fn the_proxy_of_the_kubeconfig_comes_before_that_of_the_environment() {
        let variables = [("HTTPS_PROXY", "http://other:1"), ("NO_PROXY", "*")];
        assert_eq!(chosen(Some("http://p:3128"), SERVER, &variables).unwrap(), "http://p:3128/");
        assert_eq!(chosen(None, SERVER, &[("https_proxy", "p:3128")]).unwrap(), "http://p:3128/");
        assert_eq!(chosen(None, SERVER, &[("HTTPS_PROXY", "socks5h://p:1080")]).unwrap(), "socks5://p:1080/");
        assert_eq!(chosen(Some(""), SERVER, &[]), None);
        assert_eq!(chosen(None, SERVER, &[("HTTPS_PROXY", "")]), None);
        assert_eq!(chosen(None, "http://10.0.0.1", &[("HTTPS_PROXY", "p:1")]), None);
        assert_eq!(chosen(None, "http://10.0.0.1", &[("HTTP_PROXY", "p:1")]).unwrap(), "http://p:1/");
    }

    #[test]
    fn no_proxy_names_servers_by_address_range_and_domain() {
        for (excepted, server, is_meant) in [
            ("10.0.0.1", SERVER, false),
            (" 10.0.0.0/8 , x,,", SERVER, false),
            ("10.0.0.2,p", SERVER, true),
            ("*", SERVER, false),
            ("example.com", "https://api.example.com", false),
            (".example.com", "https://api.example.com", false),
            ("example.com", "https://example.org", true),
            ("fd00::/8", "https://[fd00::1]:6443", false),
        ] {
            let variables = [("HTTPS_PROXY", "http://p:3128"), ("NO_PROXY", excepted)];
            assert_eq!(chosen(None, server, &variables).is_some(), is_meant, "{excepted} {server}");
        }
    }

    #[test]
    fn this_machine_is_reached_without_a_proxy_of_the_environment() {
        let variables = [("HTTPS_PROXY", "http://p:3128")];
        for server in ["https://localhost:6443", "https://127.0.0.1:6443", "https://[::1]:6443"] {
            assert_eq!(chosen(None, server, &variables), None);
        }
        assert!(chosen(Some("http://p:3128"), "https://127.0.0.1", &[]).is_some());
    }

    #[test]
    fn what_is_no_proxy_is_named_without_its_password() {
        let words = |value: &str| parse("HTTPS_PROXY", value).map(|(_, words)| words);
        assert_eq!(words("http://me:secret@p:1").unwrap(), "the proxy http://p:1 of HTTPS_PROXY");
        for value in ["ftp://me:secret@p", "http://me:sec ret@p", "http://"] {
            let error = words(value).unwrap_err().to_string();
            assert!(error.starts_with("HTTPS_PROXY is no proxy ") && !error.contains("sec"), "{error}");
        }
    }
}
