import { decode, encode } from '@fleetkey/protocol/cbor.ts'
import { DeviceId } from '@fleetkey/protocol/ids.ts'
import type { Secret } from '@fleetkey/protocol/secret.ts'
import { parseCertificate } from '@fleetkey/protocol/x509/certificate.ts'
import { z } from 'zod'
import { openAtRest, sealAtRest, type RestContext } from './at-rest.ts'
import type { IdentityFacts } from './core.ts'
import type { Document } from './files.ts'
import { exportTlsKey, importTlsKey, type TlsKey } from './tls-key.ts'

/** Who this device is: what enrolment gave it. Certificates are DER. */
export interface Identity {
  readonly device: string
  readonly ldevid: Uint8Array
  readonly tls: Uint8Array
  readonly tlsKey: TlsKey
  readonly chain: readonly Uint8Array[]
  /** Certificates of the server's message keys. */
  readonly keys: readonly Uint8Array[]
}

/** A renewal that was asked for and not answered: the same request is repeated, so that the server answers with the same certificate. */
export interface PendingRenewal {
  readonly id: Uint8Array
  readonly tlsKey: TlsKey
  /** Milliseconds since 1970. */
  readonly since: number
}

const bytes = z.custom<Uint8Array>((value) => value instanceof Uint8Array)
const StoredIdentity = z.strictObject({
  v: z.literal(1),
  device: DeviceId,
  ldevid: bytes,
  tls: bytes,
  tlsKey: bytes,
  chain: z.array(bytes),
  keys: z.array(bytes),
})
const StoredRenewal = z.strictObject({ v: z.literal(1), id: bytes, tlsKey: bytes, since: z.int() })

export const factsOf = (identity: Identity): IdentityFacts => {
  const [tls, ldevid] = [parseCertificate(identity.tls), parseCertificate(identity.ldevid)]
  return {
    device: identity.device,
    ldevidNotBefore: ldevid.notBefore,
    ldevidNotAfter: ldevid.notAfter,
    tlsNotBefore: tls.notBefore,
    tlsNotAfter: tls.notAfter,
  }
}

/** A value of one kind, encrypted under the storage key in a durable document. */
export interface Store<T> {
  /** Undefined when there is none, or when what is there is not ours (`onLoss` is told). */
  load(): Promise<T | undefined>
  save(value: T): Promise<void>
}

interface StoreOptions {
  readonly document: Document
  readonly storage: Secret
  /** Storage keys that it may still be under; what is saved is under `storage`. */
  readonly older?: readonly Secret[]
  readonly tenant: string
  readonly random: (length: number) => Uint8Array
  readonly onLoss: (why: string) => void
}

const sealedStore = <T>(of: StoreOptions & { kind: RestContext['kind']; write(value: T): unknown; read(value: unknown): T }): Store<T> => {
  const context: RestContext = { tenant: of.tenant, device: '', key: '', epoch: 0, kind: of.kind }
  return {
    async load() {
      const stored = await of.document.load()
      if (stored === undefined) return undefined
      try {
        const plain = openAtRest([of.storage, ...(of.older ?? [])], stored, context)
        const value = of.read(decode(plain.bytes()))
        plain.destroy()
        return value
      } catch (thrown) {
        of.onLoss(`${of.kind}: ${thrown instanceof Error ? thrown.message : String(thrown)}`)
        return undefined
      }
    },
    async save(value) {
      const plain = encode(of.write(value))
      const sealed = sealAtRest(of.storage, plain, context, of.random)
      plain.fill(0)
      // No older TLS key stays on the medium.
      await of.document.replace(sealed)
    },
  }
}

/** Where the identity is kept. */
export const identityStore = (of: StoreOptions): Store<Identity> =>
  sealedStore<Identity>({
    ...of,
    kind: 'identity',
    write: (identity) => ({ v: 1, ...identity, tlsKey: exportTlsKey(identity.tlsKey).bytes() }),
    read(value) {
      const { v: _v, tlsKey, ...stored } = StoredIdentity.parse(value)
      return { ...stored, tlsKey: importTlsKey(tlsKey) }
    },
  })

/** Where a renewal that is under way is kept; `null` once there is none. */
export const renewalStore = (of: StoreOptions): Store<PendingRenewal | null> =>
  sealedStore<PendingRenewal | null>({
    ...of,
    kind: 'renewal',
    write: (pending) => (pending === null ? null : { v: 1, id: pending.id, tlsKey: exportTlsKey(pending.tlsKey).bytes(), since: pending.since }),
    read(value) {
      if (value === null) return null
      const { id, tlsKey, since } = StoredRenewal.parse(value)
      return { id, tlsKey: importTlsKey(tlsKey), since }
    },
  })

/** The same in memory only: while the storage key does not open. */
export const memoryStore = <T>(): Store<T> => {
  let held: T | undefined
  return {
    load: async () => held,
    save: async (value) => {
      held = value
    },
  }
}
