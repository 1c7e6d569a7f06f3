/**
 * The fingerprint of CVE-2017-15361 (Nemec et al., "The Return of Coppersmith's Attack", §3): vulnerable primes are k·M + (65537^a mod M), so that the
 * modulus lies in the subgroup that 65537 generates modulo M, a primorial. Membership is decided by the discrete logarithm modulo each small prime and by
 * their agreeing modulo the orders' common divisors (Pohlig, Hellman). A modulus that is not vulnerable passes with probability below 2^-150.
 */
const generator = 65_537

const isPrime = (n: number): boolean => {
  for (let divisor = 2; divisor * divisor <= n; divisor++) if (n % divisor === 0) return false
  return n > 1
}
/** The 39 primes to 167: M of the smallest vulnerable keys, which divides that of every other size. */
const primes = Array.from({ length: 168 }, (_, n) => n).filter(isPrime)

/** For each prime: residue → exponent, and how many there are (the order of 65537). */
const logarithms = primes
  .filter((prime) => generator % prime !== 1)
  .map((prime) => {
    const exponents = new Map<number, number>()
    for (let value = 1, exponent = 0; !exponents.has(value); exponent++, value = (value * (generator % prime)) % prime) exponents.set(value, exponent)
    return { prime, exponents, order: exponents.size }
  })
/** Primes for which 65537 is 1: the modulus must be 1 there. */
const trivial = primes.filter((prime) => generator % prime === 1)

const gcd = (a: number, b: number): number => (b === 0 ? a : gcd(b, a % b))

const residue = (modulus: Uint8Array, prime: number): number => modulus.reduce((rest, byte) => (rest * 256 + byte) % prime, 0)

/** Whether this RSA modulus (big-endian) has the fingerprint. */
export const isRoca = (modulus: Uint8Array): boolean => {
  if (trivial.some((prime) => residue(modulus, prime) !== 1)) return false
  const found: { exponent: number; order: number }[] = []
  for (const { prime, exponents, order } of logarithms) {
    const exponent = exponents.get(residue(modulus, prime))
    if (exponent === undefined) return false
    if (found.some((other) => (exponent - other.exponent) % gcd(order, other.order) !== 0)) return false
    found.push({ exponent, order })
  }
  return true
}
