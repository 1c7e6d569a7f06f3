import { spawn } from 'node:child_process'
import { createECDH, createHash, createHmac, createPublicKey, generateKeyPairSync, sign, verify, type KeyObject } from 'node:crypto'
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'
import { connect, type TLSSocket } from 'node:tls'
import { Secret } from '@fleetkey/protocol/secret.ts'
import { sealTo } from '@fleetkey/protocol/wrap.ts'
import { DeviceId, Epoch, KeyId } from '@fleetkey/protocol/ids.ts'
import { cpuOf, cpuPerCall, memoryOf } from './cpu.ts'

/** What one operation costs, CPU milliseconds, with nothing around it. */
export interface Floor {
  /** Server's side of a TLS 1.3 handshake without and with a client certificate. */
  readonly handshake: number
  readonly mutualHandshake: number
  readonly sign: number
  readonly verify: number
  /** Ephemeral P-256 key and agreement: the inside of MakeCredential and of an import wrapper. */
  readonly agree: number
  /** HPKE seal of one key. */
  readonly seal: number
  /** HMAC-SHA256 and a hash: proofs. */
  readonly mac: number
  /** Bytes of resident memory per idle TLS connection of a bare listener. */
  readonly connection: number
}

interface Credentials {
  readonly key: string
  readonly cert: string
}

const open = async (port: number, credentials: Credentials | undefined): Promise<TLSSocket> =>
  await new Promise((resolve, reject) => {
    const socket = connect({ port, host: '127.0.0.1', rejectUnauthorized: false, ...credentials })
    socket.once('error', reject)
    socket.once('data', () => resolve(socket))
  })

/** Measures every operation on this machine, now. `tls`: PEM of a server and of a device. */
export const measureFloor = async (
  folder: string,
  tls: { readonly server: Credentials; readonly device: Credentials },
  connections: number,
): Promise<Floor> => {
  const [key, cert] = [join(folder, 'floor.key'), join(folder, 'floor.crt')]
  writeFileSync(key, tls.server.key, { mode: 0o600 })
  writeFileSync(cert, tls.server.cert)
  const child = spawn(process.execPath, [fileURLToPath(new URL('floor-server.ts', import.meta.url)), key, cert], { stdio: ['ignore', 'pipe', 'inherit'] })
  try {
    const { pid, stdout } = child
    if (pid === undefined || stdout === null) throw new Error('the floor server did not start')
    const port = Number(await new Promise<string>((resolve) => void createInterface({ input: stdout }).once('line', resolve)))
    const handshakes = async (count: number, credentials: Credentials | undefined): Promise<number> => {
      const before = cpuOf(pid)
      for (let done = 0; done < count; done += 8)
        await Promise.all(Array.from({ length: Math.min(8, count - done) }, async () => (await open(port, credentials)).destroy()))
      return (cpuOf(pid) - before) / count
    }
    await handshakes(100, undefined)
    const median = async (credentials: Credentials | undefined): Promise<number> => {
      const rounds: number[] = []
      for (let round = 0; round < 3; round++) rounds.push(await handshakes(200, credentials))
      return rounds.toSorted((one, other) => one - other)[1] ?? Number.NaN
    }
    const [handshake, mutualHandshake] = [await median(undefined), await median(tls.device)]
    const before = memoryOf(pid)
    const sockets: TLSSocket[] = []
    for (let count = 0; count < connections; count++) sockets.push(await open(port, tls.device))
    const connection = (memoryOf(pid) - before) / connections
    for (const socket of sockets) socket.destroy()
    return { handshake, mutualHandshake, connection, ...operations() }
  } finally {
    child.kill()
  }
}

const operations = (): Pick<Floor, 'sign' | 'verify' | 'agree' | 'seal' | 'mac'> => {
  const { privateKey, publicKey } = generateKeyPairSync('ec', { namedCurve: 'prime256v1' })
  const data = Buffer.alloc(512, 1)
  const made = sign('sha256', data, privateKey)
  const spki = publicKey.export({ format: 'der', type: 'spki' })
  const peer = createECDH('prime256v1')
  const point = new Uint8Array(peer.generateKeys())
  const context = {
    tenant: 'plant',
    device: DeviceId.parse('d-1'),
    key: KeyId.parse('k'),
    epoch: Epoch.parse(1),
    protection: 'sealed',
    purpose: 'key',
  } as const
  // The key arrives as bytes with each message: reading it is part of verifying.
  const imported = (): KeyObject => createPublicKey({ key: spki, format: 'der', type: 'spki' })
  return {
    sign: cpuPerCall(() => sign('sha256', data, privateKey)),
    verify: cpuPerCall(() => verify('sha256', data, imported(), made)),
    agree: cpuPerCall(() => {
      const one = createECDH('prime256v1')
      one.generateKeys()
      return one.computeSecret(point)
    }),
    seal: cpuPerCall(() => sealTo(point, new Secret(Buffer.alloc(32, 1)), context)),
    mac: cpuPerCall(() => createHmac('sha256', data).update(createHash('sha256').update(data).digest()).digest(), { rounds: 5, calls: 2_000 }),
  }
}
