// A TLS 1.3 listener with the settings of the broker's and nothing behind it: what a handshake costs.
import { readFileSync } from 'node:fs'
import type { AddressInfo } from 'node:net'
import { createServer } from 'node:tls'

const [key = '', cert = ''] = process.argv.slice(2)
const server = createServer({
  key: readFileSync(key),
  cert: readFileSync(cert),
  minVersion: 'TLSv1.3',
  ecdhCurve: 'X25519MLKEM768:X25519:P-256',
  requestCert: true,
  rejectUnauthorized: false,
  noDelay: true,
})
server.on('secureConnection', (socket) => {
  socket.on('error', () => undefined)
  socket.resume()
  // Says that it is done on this side as well.
  socket.write('x')
})
server.listen(0, '127.0.0.1', () => void process.stdout.write(`${(server.address() as AddressInfo).port}\n`))
