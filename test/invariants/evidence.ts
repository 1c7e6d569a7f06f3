import type { AgentStatus } from '@fleetkey/device-agent/agent.ts'
import type { Store, Tables } from '@fleetkey/server/flows/context.ts'

/** A device at rest after a fault run: what it says it holds, and what it can do with it. */
export interface DeviceEvidence {
  readonly device: string
  readonly status: AgentStatus
  encrypt(key: string, plaintext: string): Promise<string>
  decrypt(key: string, ciphertext: string): Promise<string>
  mac(key: string, data: string): Promise<{ epoch: number; mac: string }>
  verify(key: string, epoch: number, data: string, mac: string): Promise<boolean>
}

/** What somebody who has a board gets out of it without the server: under withdrawn firmware, or from its medium beside another board's TPM. */
export interface Opened {
  readonly device: string
  readonly by: 'withdrawn' | 'another TPM'
  readonly how: string
  readonly holdings: AgentStatus['holdings']
}

/** Everything that is left after a fault run. */
export interface Evidence {
  readonly store: Store
  /** Devices that are enrolled and have had time to converge. */
  readonly devices: readonly DeviceEvidence[]
  /** Epoch in use, per device and key, in the order it was seen, over all restarts. */
  readonly history: readonly { readonly device: string; readonly key: string; readonly epoch: number }[]
  /** What was tried on stolen boards; nothing unless told. */
  readonly opened?: readonly Opened[]
  /** Audit export and the key of its checkpoint. */
  readonly log: string
  readonly auditKey: Uint8Array
}

/** Every row of a table. */
export const rows = async <T extends keyof Tables>(store: Store, table: T): Promise<readonly Tables[T][]> => {
  const all: Tables[T][] = []
  for (;;) {
    const last = all.at(-1)
    const some = await store.find(table, { limit: 500, ...(last === undefined ? {} : { after: last.id }) })
    all.push(...some)
    if (some.length < 500) return all
  }
}
