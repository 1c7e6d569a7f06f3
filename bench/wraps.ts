import { createECDH, randomBytes } from 'node:crypto'
import { Aes256Gcm, CipherSuite, DhkemP256HkdfSha256, HkdfSha256 } from '@hpke/core'
import { Secret } from '@fleetkey/protocol/secret.ts'
import { wrapFor } from '@fleetkey/protocol/subset-difference/broadcast.ts'
import { everybody } from '@fleetkey/protocol/subset-difference/tree.ts'
import { sealTo } from '@fleetkey/protocol/wrap.ts'
import { cpuPerCall } from './cpu.ts'

/** Wraps of one 32-byte key, a CPU second on one core. */
export interface Wraps {
  /** HPKE to a P-256 recipient key, context and COSE_Encrypt0 included. */
  readonly hpke: number
  /** A fresh key pair and one agreement, nothing else. */
  readonly floor: number
  /** @hpke/core, same suite, the recipient key read each time as here. */
  readonly peer: number
  /** Under the label of a subset: its label, its key, AES-256-GCM. */
  readonly symmetric: number
}

const best = (values: readonly number[]): number => Math.max(...values)

const peerRate = async (point: Uint8Array, calls: number): Promise<number> => {
  const suite = new CipherSuite({ kem: new DhkemP256HkdfSha256(), kdf: new HkdfSha256(), aead: new Aes256Gcm() })
  const [key, aad] = [Uint8Array.from(randomBytes(32)).buffer, Uint8Array.from(randomBytes(64)).buffer]
  const before = process.cpuUsage()
  for (let call = 0; call < calls; call++)
    await suite.seal({ recipientPublicKey: await suite.kem.deserializePublicKey(Uint8Array.from(point).buffer), info: aad }, key, aad)
  const { user, system } = process.cpuUsage(before)
  return (calls * 1e6) / (user + system)
}

/** All in turn, three rounds, the best of each. */
export const measureWraps = async (): Promise<Wraps> => {
  const recipient = createECDH('prime256v1')
  const point = new Uint8Array(recipient.generateKeys())
  const [material, master] = [new Secret(randomBytes(32)), new Secret(randomBytes(32))]
  const context = { tenant: 'bench', device: 'gw-1', key: 'telemetry', epoch: 2, protection: 'sealed', purpose: 'key' } as const
  const shard = { tenant: 'bench', group: 'fleet', key: 'telemetry', shard: 0, generation: 1, epoch: 2, nonce: new Uint8Array(16) }
  const many = Array.from({ length: 512 }, () => everybody)
  const rounds: Wraps[] = []
  for (let round = 0; round < 3; round++)
    rounds.push({
      hpke: 1_000 / cpuPerCall(() => sealTo(point, material, context), { rounds: 3, calls: 1_000 }),
      floor:
        1_000 /
        cpuPerCall(
          () => {
            const pair = createECDH('prime256v1')
            pair.generateKeys()
            return pair.computeSecret(point)
          },
          { rounds: 3, calls: 1_000 },
        ),
      peer: await peerRate(point, 500),
      symmetric: (1_000 * many.length) / cpuPerCall(() => wrapFor(master, many, material, shard), { rounds: 3, calls: 20 }),
    })
  return {
    hpke: best(rounds.map((one) => one.hpke)),
    floor: best(rounds.map((one) => one.floor)),
    peer: best(rounds.map((one) => one.peer)),
    symmetric: best(rounds.map((one) => one.symmetric)),
  }
}
