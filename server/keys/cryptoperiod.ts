import type { KeyEpoch, ManagedKey } from './key.ts'

/** When the epoch in use has been used to protect for as long as it may (originator-usage period, SP 800-57 Part 1, 5.3.4); null: nothing says so. */
export const rotatesAt = ({ originatorUsage }: ManagedKey, current: KeyEpoch | undefined): number | null =>
  originatorUsage === undefined || originatorUsage === null || current?.state !== 'active' || current.activatedAt === null
    ? null
    : current.activatedAt + originatorUsage

/** AES-GCM with random nonces: 2^32 messages under one key (SP 800-38D, 8.3). An HMAC key has no such limit. */
export const gcmLimit = 2 ** 32

/** Whether so many messages are enough to replace the epoch: at half its limit, since devices that are away go on using it. */
export const isUsedUp = ({ usageLimit }: ManagedKey, used: number): boolean => typeof usageLimit === 'number' && used >= Math.ceil(usageLimit / 2)
