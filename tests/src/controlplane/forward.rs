//! A listener on loopback whose connections go on inside a namespace of the lab.

use crate::lab::{Family, Place};
use anyhow::Result;
use std::net::{Ipv4Addr, SocketAddr};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

/// Listens on a free port of 127.0.0.1; connections go on to `to` from a socket of `place`.
pub(crate) async fn listen(place: Place, to: SocketAddr) -> Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let place = place.clone();
            tokio::spawn(async move {
                // What fails here, the caller sees as a connection that ends.
                let _ = forward(stream, place, to).await;
            });
        }
    });
    Ok(address)
}

async fn forward(mut outside: TcpStream, place: Place, to: SocketAddr) -> Result<()> {
    let socket = tokio::task::spawn_blocking(move || place.tcp_socket(Family::of(to.ip()))).await??;
    let socket = std::net::TcpStream::from(socket);
    socket.set_nonblocking(true)?;
    let mut inside = TcpSocket::from_std_stream(socket).connect(to).await?;
    outside.set_nodelay(true)?;
    inside.set_nodelay(true)?;
    tokio::io::copy_bidirectional(&mut outside, &mut inside).await?;
    Ok(())
}
