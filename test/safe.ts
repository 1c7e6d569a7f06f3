import { createECDH } from 'node:crypto'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { openSealedShare, sealShare, type Share } from '@fleetkey/protocol/share.ts'
import type { Seal, SplitOrder } from '@fleetkey/server/flows/context.ts'
import { openKms } from '@fleetkey/server/kms/open.ts'
import { openSafe, type Safe } from '@fleetkey/server/kms/safe.ts'

/** A folder of keys under a passphrase that can be taken away. */
export interface TestSafe {
  readonly folder: string
  /** Opens it, or finds it sealed. */
  open(): Promise<Safe>
  /** Takes the passphrase away, or brings it back. */
  passphrase(there: boolean): void
  close(): Promise<void>
}

export const testSafe = (): TestSafe => {
  const place = mkdtempSync(join(tmpdir(), 'fk-safe-'))
  const [folder, passphraseFile] = [join(place, 'kms'), join(place, 'passphrase')]
  const opened: Safe[] = []
  const passphrase = (there: boolean): void =>
    there ? writeFileSync(passphraseFile, 'correct horse battery', { mode: 0o600 }) : rmSync(passphraseFile, { force: true })
  passphrase(true)
  return {
    folder,
    passphrase,
    async open() {
      const safe = await openSafe({
        folder,
        open: async (master) => await openKms({ folder, master }, { kind: 'file', passphraseFile, keyFile: null }),
        step: () => undefined,
        onOpen: () => undefined,
      })
      opened.push(safe)
      return safe
    },
    async close() {
      for (const safe of opened) await safe.close()
      rmSync(place, { recursive: true, force: true })
    },
  }
}

/** A key pair that shares are sealed to, and what opens them. */
export const shareReader = (): { readonly recipient: Uint8Array; readonly read: (sealed: Uint8Array) => Share } => {
  const key = createECDH('prime256v1')
  key.generateKeys()
  return { recipient: new Uint8Array(key.getPublicKey()), read: (sealed) => openSealedShare(key, 'out', sealed) }
}

/** Splits without asking anybody, and confirms. */
export const splitInto = async (seal: Seal, order: SplitOrder): Promise<readonly Share[]> => {
  const { recipient, read } = shareReader()
  const { set, shares } = await seal.split(order, recipient)
  await seal.confirm(set)
  return shares.map(read)
}

/** As it is handed in: sealed to the process that holds the keys. */
export const sealedTo = async (seal: Seal, share: Share | undefined): Promise<Uint8Array> => {
  if (share === undefined) throw new Error('there is no such share')
  return sealShare((await seal.status()).recipient, 'in', share)
}
